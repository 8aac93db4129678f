"""What the numbers were measured on: processor, memory, versions, commit, settings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import cases
import torch

_ROOT = Path(__file__).resolve().parent.parent
# Settings that change what is measured; the jobs set some of them and clear the others.
ENVIRONMENT = (
    "FUSEDKL_BACKEND",
    "FUSEDKL_CPU_ISA",
    "FUSEDKL_HUGE_PAGES",
    "FUSEDKL_KEEP_MEMORY",
    "THP_MEM_ALLOC_ENABLE",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "GLIBC_TUNABLES",
)


def instruction_set() -> str:
    """The instruction set that the compiled kernels run on, or "reference" without them."""
    import fusedkl

    compiled = any(known.name == "cpu" and known.available for known in fusedkl.backends())
    if not compiled or os.environ.get("FUSEDKL_BACKEND") == "reference":
        return "reference"
    # avx512_bf16 differs from avx512 in one conversion only
    return str(torch.ops.fusedkl._cpu_isa()).partition("_")[0]


def describe() -> dict[str, object]:
    """Everything a reader needs to judge whether two runs may be compared."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_MiB": cases.last_level_cache_bytes() / 2**20,
        "memory_GiB": round(cases.memory_bytes() / 2**30, 1),
        "transparent_huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "system": f"{platform.system()} {platform.release()}",
    }


def gpu() -> dict[str, object]:
    """The card that is in use, and what the driver says of it."""
    card = torch.cuda.get_device_properties(0)
    query = ("--query-gpu=driver_version,clocks.max.mem,power.limit", "--format=csv,noheader")
    return {
        "card": card.name,
        "capability": f"sm_{card.major}{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "card_memory_GiB": round(card.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", *query).strip(),
    }


def versions() -> dict[str, str]:
    import fusedkl

    return {
        "fusedkl": getattr(fusedkl, "__version__", "unknown"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("triton", "liger-kernel")},
        "compiler": _output(os.environ.get("CXX", "g++"), "--version").partition("\n")[0],
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of the working tree, marked when what is measured or measures is not its."""
    revision = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD").strip()
    if not revision:
        return "unknown"
    changed = _output(
        "git", "-C", str(_ROOT), "status", "--porcelain", "--", ".", ":!bench/results"
    ).strip()
    return revision + (" with changes" if changed else "")


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def load() -> list[float]:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else []


def command() -> str:
    return " ".join(["python", "bench/run.py", *sys.argv[1:]])


def _processor() -> str:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _first_line(path: str) -> str:
    return _text(path).partition("\n")[0]


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _output(*command_line: str) -> str:
    try:
        return subprocess.run(
            command_line, capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
