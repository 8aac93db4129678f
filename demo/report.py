"""What the contenders measured: whether they agree, and the table."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

CONTENDERS = ("eager", "compile", "fusedkl")
TITLES = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "fusedkl": "fusedkl",
}
LIMIT = 1e-4  # nats per token between any two curves at any step

BUSY = 0.15  # of the time, from which on waiting for a core is said


@dataclass
class Result:
    """What one contender measured. Seconds are medians over the steps, bytes the largest."""

    contender: str
    runs_on: str
    vocabulary: int
    warm_up_seconds: float
    loss_seconds: float = math.nan  # KL loss and its gradient to the logits
    step_seconds: float = math.nan  # model, losses, gradients, optimizer
    peak_bytes: int | None = None  # that the KL loss and its gradient need beside both logits
    memory_method: str = "not measured"
    waiting: float | None = None  # seconds per second that threads waited for a core, all steps
    loss: list[float] = field(default_factory=list)  # nats per token, one entry per step
    kl: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Gap:
    """The place where two curves are farthest apart."""

    nats: float
    curve: str
    step: int
    pair: tuple[str, str]

    @property
    def agrees(self) -> bool:
        return self.nats <= LIMIT  # false for NaN

    def __str__(self) -> str:
        left, right = self.pair
        return f"{self.nats:.1e} nats (the {self.curve} of {left} and {right}, step {self.step})"


def widest_gap(results: Sequence[Result]) -> Gap:
    """The largest difference between the loss or KL curves of any two contenders.

    Anything that is not a finite number counts as infinitely far from everything; so do curves of
    unequal length.
    """
    gaps = []
    for left, right in itertools.combinations(results, 2):
        pair = (left.contender, right.contender)
        for curve in ("loss", "kl"):
            ours, theirs = getattr(left, curve), getattr(right, curve)
            if len(ours) != len(theirs) or not ours:
                gaps.append(Gap(math.inf, curve, min(len(ours), len(theirs)), pair))
            for step, (a, b) in enumerate(zip(ours, theirs, strict=False)):
                nats = abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf
                gaps.append(Gap(nats, curve, step, pair))
    if not gaps:
        raise ValueError(f"at least two contenders are needed to compare, got {len(results)}")
    return max(gaps, key=lambda gap: gap.nats)


def milliseconds(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def mebibytes(count: float | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:.0f} MiB"


def times_less(first: float | None, value: float | None) -> str:
    """How many times smaller `value` is than `first`, in words; empty where it cannot be said."""
    if first is None or value is None or not value > 0 or not first > 0:
        return ""
    ratio = max(first / value, value / first)
    if ratio < 1.005:
        return "the same"
    digits = 2 if ratio < 2 else 1 if ratio < 10 else 0
    return f"{ratio:.{digits}f}x {'less' if value < first else 'more'}"


def table(results: Sequence[Result]) -> str:
    """One column per contender; costs with their ratio to the first contender's."""

    def cost(name: str, show: Callable[[float], str]) -> list[str]:
        first = getattr(results[0], name)
        cells = [show(first)]
        for result in results[1:]:
            value = getattr(result, name)
            cells.append(f"{show(value)}\n{times_less(first, value)}")
        return cells

    rows: list[list[str]] = [
        ["KL loss and its backward,\nper step", *cost("loss_seconds", milliseconds)],
        ["whole step", *cost("step_seconds", milliseconds)],
        ["peak extra memory\nof the KL loss", *cost("peak_bytes", mebibytes)],
        ["warm-up (in no step)", *(milliseconds(r.warm_up_seconds) for r in results)],
        ["loss, first step", *(f"{r.loss[0]:.6f}" for r in results)],
        ["loss, last step", *(f"{r.loss[-1]:.6f}" for r in results)],
        ["KL, first step", *(f"{r.kl[0]:.3g}" for r in results)],
        ["KL, last step", *(f"{r.kl[-1]:.6f}" for r in results)],
    ]
    headers = ["", *(TITLES[r.contender] for r in results)]
    alignment = ("left", *("right" for _ in results))
    return tabulate(
        rows, headers, tablefmt="rounded_grid", colalign=alignment, disable_numparse=True
    )


def busy(results: Sequence[Result]) -> str:
    """A warning, if others kept the contenders from their cores; else empty."""
    waiting = max((result.waiting or 0.0 for result in results), default=0.0)
    if waiting < BUSY:
        return ""
    return (
        f"Others used the machine (threads waited {waiting:.0%} of the time): times are unreliable."
    )


def footnote(settings: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """What the table was measured on, in lines."""
    tokens, vocabulary = settings["tokens"], results[0].vocabulary
    lines = [
        f"Times: median of {settings['steps']} steps of {tokens} tokens, vocabulary {vocabulary}, "
        f"float32, the top {settings['trained_layers']} layers trained.",
        f"Memory: largest of all steps ({results[0].memory_method}), with the gradient, "
        f"which alone is {mebibytes(4 * tokens * vocabulary)}.",
        f"Loss: cross-entropy + {settings['beta']:g} KL(reference || policy), nats per token, "
        f"over {settings['batches']} batches in turn, one process each.",
        f"{settings['processor']}, {settings['threads']} threads, torch {settings['torch']}.",
        f"fusedkl: {results[-1].runs_on}.",
    ]
    warning = busy(results)
    return [*lines, warning] if warning else lines
