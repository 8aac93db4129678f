"""`python -m fusedkl info`: what is installed and which backends can run, for bug reports."""

from __future__ import annotations

import argparse
import os
import platform

import torch

import fusedkl

from . import _library

ENVIRONMENT = (
    "FUSEDKL_BACKEND",
    "FUSEDKL_CPU_ISA",
    "FUSEDKL_HUGE_PAGES",
    "FUSEDKL_KEEP_MEMORY",
)


def info() -> str:
    """The report."""
    library = _library.path()
    lines = [
        ("fusedkl", fusedkl.__version__),
        ("torch", torch.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("library", _library.why_not() or (library.name if library else "")),
        ("threads", str(torch.get_num_threads())),
        *((name, os.environ[name]) for name in ENVIRONMENT if name in os.environ),
    ]
    head = [f"{name:<10} {value}" for name, value in lines]
    return "\n".join(
        [*head, "backends, best first:", *(f"  {status}" for status in fusedkl.backends())]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fusedkl", description=__doc__)
    parser.add_argument("command", choices=["info"], help="info: print the report")
    parser.parse_args()
    print(info())


if __name__ == "__main__":
    main()
