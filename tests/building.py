"""Building and installing this project from a copy, for the tests of what leaves the folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE_FOLDERS = ("fusedkl", "kernels", "csrc", "tests", "bench", "demo")
SOURCE_SUFFIXES = {".py", ".typed", ".cpp", ".h", ".cu", ".cuh"}


def sources(root: Path, folders: tuple[str, ...] = SOURCE_FOLDERS) -> set[str]:
    return {
        file.relative_to(root).as_posix()
        for folder in folders
        for file in (root / folder).rglob("*")
        if file.suffix in SOURCE_SUFFIXES
    }


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed, in an environment without the build's switches."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDKL_")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}"
    return done.stdout


def build(kind: str, tree: Path, into: Path, **environment: str) -> Path:
    """The one artefact that the build backend makes of `tree`."""
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    run(sys.executable, "-c", script, cwd=tree, **environment)
    (artefact,) = into.iterdir()
    return artefact


def checkout(into: Path) -> Path:
    """The project as a clone has it: building must not write into the checkout under test."""
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "out", "*.egg-info", "*.so", "__pycache__", ".*_cache"
    )
    return Path(shutil.copytree(ROOT, into / "fusedkl", ignore=left_out))


def unpack(archive: Path, into: Path) -> Path:
    """The folder that a source distribution holds."""
    with tarfile.open(archive) as tar:
        tar.extractall(into, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = into.iterdir()
    return folder
