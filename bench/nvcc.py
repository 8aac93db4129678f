"""Finds a CUDA toolkit and compiles csrc/cuda to machine code, for GPUs that are not there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("80", "90a", "100", "120")


def _homes() -> list[Path]:
    """Where a toolkit may be: as the environment says, on the path, or the PyPI packages."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found = shutil.which("nvcc")
    on_path = [Path(found).resolve().parents[1]] if found else []
    packages = Path(torch.__file__).parents[1] / "nvidia" / "cu13"
    return [*named, *on_path, Path("/usr/local/cuda"), packages]


def toolkit(*files: str) -> Path | None:
    """The first toolkit that has these files."""
    for home in _homes():
        if all((home / file).is_file() for file in files):
            return home
    return None


def version(home: Path) -> str:
    """Of the compiler in a toolkit."""
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", said.stdout)
    return found.group(1) if found else "unknown"


def digest(files: Iterable[Path], words: Iterable[str]) -> str:
    """A name for what is made from these files with these flags."""
    found = hashlib.sha256(" ".join(words).encode())
    for file in files:
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()[:16]


def sources(*folders: Path) -> list[Path]:
    """All C++ and CUDA files in these folders."""
    kept = (".h", ".cuh", ".cu", ".cpp")
    return [file for at in folders for file in sorted(at.glob("*.*")) if file.suffix in kept]


def cubin(source: str, target: str) -> tuple[bytes, str]:
    """The machine code of csrc/cuda/`source`.cu and what ptxas said; kept by its sources' hash."""
    home = toolkit("bin/nvcc")
    if home is None:
        raise FileNotFoundError("no nvcc: install a toolkit, or the packages of `make cuda-tools`")
    csrc = ROOT / "csrc"
    flags = ["-O3", "-std=c++20", f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v"]
    flags += ["-Werror", "all-warnings"]
    made_from = digest(sources(csrc / "cuda", csrc), flags)
    code = ROOT / "build" / "cuda_static" / f"{source}.{target}.{made_from}.cubin"
    log = code.with_suffix(".txt")
    code.parent.mkdir(parents=True, exist_ok=True)
    with code.with_suffix(".lock").open("w") as lock:  # of two test processes, one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.is_file():
            command = [home / "bin" / "nvcc", *flags, csrc / "cuda" / f"{source}.cu", "-o", code]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{source}.cu for sm_{target}:\n{done.stdout}{done.stderr}")
            log.write_text(done.stdout + done.stderr)
    return code.read_bytes(), log.read_text()
