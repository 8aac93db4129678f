"""Builds the CUDA kernels as host C++ against the shim, and registers them as a backend.

Device code, launches and operators are those of csrc/cuda; only `fibers.h`, `shim.h` and
`intrinsics.h` beside this file stand for the device. What is built is kept under build/, by the
hash of all that went into it.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_modules import nvcc

from fusedkl import topk_ops
from fusedkl._library import OPERATORS
from fusedkl.backends import BACKENDS, Backend

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAME = "cuda_on_cpu"
OPERATOR_SOURCES = (
    *("cuda/bf16.cu", "cuda/f16.cu", "cuda/f32.cu", "cuda/mixed.cu", "cuda/rows.cu"),
    *("cuda/family_bf16.cu", "cuda/family_f16.cu", "cuda/family_f32.cu", "cuda/family_any.cu"),
    *("cuda/topk.cu", "cuda/topk_ops.cpp"),
    *("cuda/ops.cpp", "cpu/family_series.cpp"),
)

# Vectors are read through pointers of another type, as devices allow and C++ does not.
FLAGS = (
    *("-std=c++20", "-g1", "-pthread", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-Wall", "-Werror", "-Wno-unknown-pragmas", "-DFUSEDKL_ON_CPU"),
)


def cuda_include() -> Path:
    """The folder of CUDA's headers."""
    home = nvcc.toolkit("include/cuda_bf16.h", "include/crt/host_defines.h")
    if home is None:
        pytest.skip("no CUDA headers: install a toolkit, or the packages of `make cuda-tools`")
    return home / "include"


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """The finished process; a failed test with its output if it failed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done


def build(
    sources: Sequence[Path], output: str, flags: Sequence[str], link: Sequence[str], csrc: Path
) -> Path:
    """Compiles what has changed; returns the library or program."""
    include = ["-isystem", str(cuda_include()), f"-I{HERE}", f"-I{csrc}"]
    everything = [*FLAGS, *flags, *include]
    made_from = nvcc.sources(csrc / "cuda", csrc / "cpu", csrc, HERE)
    words = [*everything, *map(str, sources), torch.__version__]
    folder = ROOT / "build" / NAME / nvcc.digest(made_from, words)
    target = folder / output
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # of two test processes, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            _compile(sources, target, everything, [*flags, *link])
    return target


def _compile(
    sources: Sequence[Path], target: Path, compiling: Sequence[str], linking: Sequence[str]
) -> None:
    def compile_one(source: Path) -> Path:
        made = target.with_name(f"{source.name}.o")
        run(["g++", *compiling, "-x", "c++", "-c", source, "-o", made])
        return made

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = target.with_name(f"{target.name}.partial")
    run(["g++", *objects, "-pthread", *linking, "-o", partial])
    partial.rename(target)


@functools.cache
def library() -> Path:
    """The operators of csrc/cuda, for CPU tensors."""
    torch_home = Path(torch.__file__).parent
    flags = ["-O1", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-isystem", str(torch_home / "include")]
    sources = [ROOT / "csrc" / name for name in OPERATOR_SOURCES]
    link = ["-shared", f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"]
    return build(sources, "operators.so", flags, link, ROOT / "csrc")


@functools.cache
def operators() -> SimpleNamespace:
    """Its operators, under the names that a backend has."""
    definitions = torch.library.Library(f"fusedkl_{NAME}", "DEF")
    everything = {**OPERATORS, **topk_ops.ARGUMENTS}
    for name, (arguments, results) in everything.items():
        definitions.define(f"_{name}({arguments}) -> {results}")
    torch.ops.load_library(str(library()))
    namespace = getattr(torch.ops, f"fusedkl_{NAME}")
    return SimpleNamespace(
        **{name: getattr(namespace, f"_{name}") for name in everything}, definitions=definitions
    )


@contextlib.contextmanager
def registered() -> Iterator[str]:
    """The kernels as a backend of the public functions, by its name, while this lasts."""
    kernels = operators()
    BACKENDS[NAME] = Backend(
        NAME, "CUDA on the CPU", lambda device: None, kernels, gradient_ahead=True
    )
    topk_ops.KERNELS[NAME] = kernels
    try:
        yield NAME
    finally:
        del BACKENDS[NAME], topk_ops.KERNELS[NAME]


@dataclass
class Launch:
    """A kernel, by its name without template arguments, and how it was launched."""

    name: str
    blocks: int
    threads: int
    cluster: int


@functools.cache
def _names() -> dict[int, str]:
    """Of functions, by their address in the library."""
    found = {}
    for line in run(["nm", "-C", "--defined-only", library()]).stdout.splitlines():
        kernel = re.match(r"(\w+) [tTwW] .*\bgpu::(\w+_kernel)\b", line)
        if kernel is not None:
            found[int(kernel[1], 16)] = kernel[2]
    return found


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches made inside the block, in order; the list is filled at its end."""
    found: list[Launch] = []
    with tempfile.NamedTemporaryFile() as log:
        os.environ["SHIM_LAUNCHES"] = log.name
        try:
            yield found
        finally:
            del os.environ["SHIM_LAUNCHES"]
        for line in Path(log.name).read_text().splitlines():
            address, *sizes = line.split()
            found.append(Launch(_names()[int(address, 16)], *map(int, sizes)))
