"""Peak extra memory of one contender, each case in a process of its own.

The kernel keeps the high-water mark of resident memory (VmHWM) and lowers it to what is resident
now when "5" is written to clear_refs; the difference around one call is exact to a few pages and
sees every allocator. Each process warms up first on two rows (thread pools, autograd), except for
the compiled peer, which must see the full shape to compile for it.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cases
import contenders
import torch
from cases import DTYPES, NARROW
from contenders import Contender
from goals import Result
from jobs_io import Reporter

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """Who, with which dtype, with or without backward."""

    goal: str
    who: str
    dtype: str
    backward: bool

    @property
    def name(self) -> str:
        return f"memory-{self.who}-{'backward' if self.backward else 'forward'}-{self.dtype}"


CASES = [
    *(Case("memory_forward", "fusedkl", dtype, False) for dtype in DTYPES),
    *(Case("memory_backward", "fusedkl", dtype, True) for dtype in DTYPES),
    *(Case("memory_inplace", "inplace", dtype, True) for dtype in DTYPES),
    Case("memory_peer", "compile", "bf16", False),
    Case("memory_peer", "compile", "bf16", True),
    Case("memory_peer", "eager", "bf16", False),
    Case("memory_peer", "eager", "bf16", True),
    Case("memory_peer", "rowloop", "bf16", True),
]


def resident(field: str = "VmRSS") -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def supported() -> bool:
    """Whether this system can reset the high-water mark (Linux, /proc mounted)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        resident("VmHWM")
    except OSError:
        return False
    return True


def settle() -> None:
    """Give freed memory back, so that reused heap does not hide an allocation."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def peak(call: Callable[[], object]) -> int:
    """Bytes by which resident memory rose above what it was, at most, during a call."""
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    kept = call()
    extra = resident("VmHWM") - before
    del kept
    return max(extra, 0)


def run(reporter: Reporter, quick: bool, case: Case) -> None:
    """Measure one case and emit it: MiB where the goal is in MiB, else multiples of a gradient."""
    vocabulary = next(iter(cases.vocabularies(quick).values()))
    rows = 64 if quick else 256
    title = f"{case.who} {case.dtype} {'fwd + bwd' if case.backward else 'fwd'} {rows}x{vocabulary}"
    if not supported():
        reporter.emit(Result(case.goal, title, note="this system cannot reset VmHWM"))
        return
    reporter.step(title)
    problem = cases.make(NARROW, vocabulary, rows, case.dtype)
    contender = _contender(case)
    warm_up = problem
    if case.who != "compile":
        two = problem.policy[:2].clone(), problem.reference[:2].clone()
        warm_up = cases.Problem("two rows", case.dtype, *two, distinct=2)
    _call(contender, warm_up, case.backward)
    leaf = problem.policy.requires_grad_(case.backward)
    if case.backward:
        extra = peak(lambda: contenders.gradient(contender, leaf, problem.reference))
    else:
        extra = peak(lambda: contenders.forward(contender, problem))
    gradient = problem.policy.numel() * problem.policy.element_size()
    in_mib = case.goal in ("memory_forward", "memory_inplace")
    reporter.emit(
        Result(
            case.goal,
            title,
            extra / (MIB if in_mib else gradient),
            note=f"{extra / MIB:.1f} MiB; one gradient is {gradient / MIB:.1f} MiB",
            detail={"extra_bytes": float(extra), "gradient_bytes": float(gradient)},
        )
    )


def _contender(case: Case) -> Contender:
    if case.who == "compile":
        # Of the two ways of writing it, the one that keeps no per-token tensors.
        torch._dynamo.reset()
        return Contender("torch.compile", torch.compile(contenders.two_lines))
    return {
        "fusedkl": contenders.ours(case.dtype),
        "inplace": contenders.ours_inplace(case.dtype),
        "eager": contenders.EAGER,
        "rowloop": contenders.ROW_LOOP,
    }[case.who]


def _call(contender: Contender, problem: cases.Problem, backward: bool) -> None:
    if backward:
        policy = problem.policy.clone().requires_grad_()
        contenders.gradient(contender, policy, problem.reference)
    else:
        contenders.forward(contender, problem)
