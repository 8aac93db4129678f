"""Builds the CUDA library for every target, without a GPU, and says how large it is.

    python bench/cuda_library.py            build it and print the facts
    python bench/cuda_library.py --write    the same into bench/results/cuda-library.json and
                                            docs/gpu.md

Objects are kept in build/cuda_library, so a second run only links. Needs a whole CUDA toolkit.
The results' file has the digest of the sources: while they are these, `make test-full` takes its
word and builds nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
import nvcc
import sass
import torch

ROOT = nvcc.ROOT
RESULTS, PAGE = ROOT / "bench" / "results" / "cuda-library.json", ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- library:begin -->\n", "<!-- library:end -->\n"
OBJECTS = ROOT / "build" / "cuda_library"
MOST_BYTES, AIM_BYTES = 12 << 20, 6 << 20

# Work in double, a block or a thread per row: no hot loop. All others keep everything in registers.
DOUBLE = re.compile(r"merge_kernel|prepare_kernel|finish_kernel|topk_")
MOST_STACK_BYTES = 200

# Loads the library beside the package that is there, and asks what it has.
_LOADS = """
import sys, torch, fusedkl
from fusedkl import _library, topk_ops
torch.ops.load_library(sys.argv[1])
names = [*_library.OPERATORS, *topk_ops.ARGUMENTS]
lacking = [name for name in names if not _library.has_kernel(f"_{name}", "CUDA")]
assert not lacking, lacking
x = torch.randn(2, 9)
assert float(fusedkl.forward_kl(x, x).sum()) == 0
"""

# setup.py's own build, of this library alone.
_BUILD = """
import sys, setuptools
from distutils.core import run_setup
found = run_setup("setup.py", sys.argv[1:], stop_after="commandline")
found.ext_modules = [one for one in found.ext_modules if one.name == "fusedkl._C_cuda"]
found.run_commands()
"""


def build(folder: Path) -> Path:
    """The library, linked into `folder`; what the compiler said is the error if it failed."""
    places = ["--build-lib", str(folder), "--build-temp", str(OBJECTS)]
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, "build_ext", *places],
        cwd=ROOT,
        env={
            **os.environ,
            "FUSEDKL_BUILD_CUDA": "1",
            "NVCC_APPEND_FLAGS": "-Werror all-warnings",
        },
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-5000:] + done.stderr[-5000:])
    (library,) = folder.glob("fusedkl/_C_cuda*")
    return library


def targets(library: Path) -> dict[str, list[str]]:
    """The architectures that its machine code and its PTX are for."""
    found = {}
    for kind, option in (("machine code", "--list-elf"), ("PTX", "--list-ptx")):
        said = subprocess.run(
            [sass.tool("cuobjdump"), option, library], capture_output=True, text=True, check=True
        )
        names = set(re.findall(r"sm_\d+a?", said.stdout))
        found[kind] = sorted(names, key=lambda name: int(name[3:].rstrip("a")))
    return found


def sources() -> str:
    """A digest of what the library is made of, and how."""
    csrc = ROOT / "csrc"
    files = [*nvcc.sources(csrc / "cuda", csrc), csrc / "cpu" / "family_series.cpp"]
    return nvcc.digest([*files, ROOT / "setup.py"], [])


def recorded() -> dict[str, Any] | None:
    """The results' file, if it is of these sources."""
    content: dict[str, Any] = json.loads(RESULTS.read_text())
    return content if content.get("sources") == sources() else None


def load(library: Path) -> None:
    """Without a GPU: every operator has its kernel; the error is what was said otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", _LOADS, library],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def spilling(stacks: dict[str, int]) -> dict[str, int]:
    """The kernels of a target that have more on the stack than they may."""
    return {k: n for k, n in stacks.items() if n > MOST_STACK_BYTES * bool(DOUBLE.search(k))}


def stack_bytes(library: Path) -> dict[str, dict[str, int]]:
    """Of every kernel, by target: where nothing spills and no array is indexed, it is 0."""
    found: dict[str, dict[str, int]] = {}
    said = subprocess.run(
        [sass.tool("cuobjdump"), "--dump-resource-usage", library],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    pattern = r"^ *arch = (\w+)|Function (\w+):\s+REG:\d+ STACK:(\d+)"
    for target, kernel, stack in re.findall(pattern, said.stdout, flags=re.MULTILINE):
        if target:
            of_target = found.setdefault(target, {})
        else:
            of_target[kernel] = int(stack)
    return found


def compile_seconds() -> float:
    """Of all objects, one after another, when each was last compiled (ninja's log)."""
    took = {}
    for line in (OBJECTS / ".ninja_log").read_text().splitlines()[1:]:
        begin, end, _, output, _ = line.split("\t")
        if "/csrc/cuda/" in output:
            took[output] = (int(end) - int(begin)) / 1e3
    return round(sum(took.values()))


def facts(library: Path) -> dict[str, Any]:
    """What the results' file has."""
    home = nvcc.toolkit("bin/nvcc", "include/cuda_runtime.h")
    load(library)
    stacks = stack_bytes(library)
    return {
        "command": "python bench/cuda_library.py --write",
        "commit": machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"torch": torch.__version__, "nvcc": nvcc.version(home) if home else "none"},
        "bytes": library.stat().st_size,
        "targets": targets(library),
        "kernels": {target: len(of) for target, of in stacks.items()},
        "spilling": {target: found for target, of in stacks.items() if (found := spilling(of))},
        "compile_seconds": compile_seconds(),
        "sources": sources(),
    }


def section(content: dict[str, Any]) -> str:
    """The Markdown between the marks of docs/gpu.md."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    kinds = "; ".join(
        f"{kind} for {', '.join(names)}" for kind, names in content["targets"].items()
    )
    minutes = content["compile_seconds"] / 60
    return (
        f"The library is {content['bytes'] / 2**20:.1f} MiB ({MOST_BYTES >> 20} allowed, "
        f"{AIM_BYTES >> 20} aimed at): {kinds}. Compiling it took {minutes:.0f} minutes, one "
        f"source after another. From `bench/results/cuda-library.json`, written by "
        f"`{content['command']}` at commit {content['commit']} on {content['date']} with "
        f"{versions}.\n"
    )


def write(content: dict[str, Any]) -> None:
    """The results' file, and what docs/gpu.md shows of it."""
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + section(content) + END + rest.split(END)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the results and docs/gpu.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        content = facts(build(Path(folder)))
    print(section(content))
    if options.write:
        write(content)
    return 0 if content["bytes"] <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
