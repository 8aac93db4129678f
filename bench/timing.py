"""Interleaved timing: A B A B A in one process, and the ratio of each B to the As beside it.

On a shared machine two separate measurements differ by the neighbours' load more than by the code.
Interleaving puts both under the same load; a ratio per round, then the median of the ratios, drops
the rounds that were disturbed half-way. One thread is timed on the process-CPU clock, which stops
while the process is descheduled; threads need the wall clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], int]
CPU: Clock = time.process_time_ns
WALL: Clock = time.perf_counter_ns


def GPU() -> int:
    """The clock of events on the current stream: `sample` asks the events, not this function."""
    raise TypeError("the GPU's clock measures a call from its two ends: use sample()")


@dataclass(frozen=True)
class Step:
    """Something to time, and what to put right before each sample, untimed."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None
    # False: `before` must precede every call, so a sample is a single call.
    repeatable: bool = True


@dataclass(frozen=True)
class Spread:
    """Median and the 10% and 90% points of some samples, with their minimum."""

    median: float
    low: float
    high: float
    least: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        return cls(
            statistics.median(samples),
            quantile(samples, 0.1),
            quantile(samples, 0.9),
            min(samples),
        )


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of both sides and the ratio other / base, all with their spread."""

    base: Spread
    other: Spread
    ratio: Spread
    rounds: int


def quantile(samples: list[float], share: float) -> float:
    """Linear interpolation between order statistics; defined for a single sample too."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def sample(step: Step, clock: Clock, calls: int = 1) -> float:
    """Seconds per call. Results are dropped inside: giving memory back is part of the cost."""
    if step.before is not None:
        step.before()
    if clock is GPU:
        return _between_events(step, calls)
    start = clock()
    for _ in range(calls):
        step.run()
    return (clock() - start) / calls * 1e-9


def _between_events(step: Step, calls: int) -> float:
    """What `before` left in the queue hides the time of launching, as it does in training."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        step.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls * 1e-3


def fastest(candidates: dict[str, Step], clock: Clock, tries: int = 3) -> str:
    """The name of the candidate with the least time of a few tries, each after a warm-up."""
    least = {}
    for name, step in candidates.items():
        sample(step, clock)
        least[name] = min(sample(step, clock) for _ in range(tries))
    return min(least, key=least.__getitem__)


def calls_for(step: Step, clock: Clock, least_seconds: float) -> int:
    """How many calls make one sample long enough. Warms up: the first call decides only where it
    was so long that no warm-up can have been most of it."""
    first = sample(step, clock)
    if not step.repeatable or first > 10 * least_seconds:
        return 1
    once = sample(step, clock)
    return max(1, min(10_000, round(least_seconds / max(once, 1e-7))))


def compare(
    base: Step,
    other: Step,
    *,
    clock: Clock = CPU,
    rounds: int = 9,
    seconds: float = 6.0,
    least_rounds: int = 5,
    least_sample: float = 0.02,
) -> Comparison:
    """Time base, other, base, other, ..., base; after `seconds`, stop at `least_rounds`.

    Each ratio is other / mean(base before, base after).
    """
    base_calls = calls_for(base, clock, least_sample)
    other_calls = calls_for(other, clock, least_sample)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        bases = [sample(base, clock, base_calls)]
        others: list[float] = []
        while len(others) < rounds:
            others.append(sample(other, clock, other_calls))
            bases.append(sample(base, clock, base_calls))
            if len(others) >= min(least_rounds, rounds) and time.perf_counter() - started > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    ratio = Spread.of(ratios(bases, others))
    return Comparison(Spread.of(bases), Spread.of(others), ratio, len(others))


def ratios(bases: list[float], others: list[float]) -> list[float]:
    """The ratio of each `other` to the mean of the two `base` samples around it."""
    if len(bases) != len(others) + 1:
        raise ValueError(f"bases must be one more than others, got {len(bases)} and {len(others)}")
    return [
        other / ((before + after) / 2)
        for before, other, after in zip(bases[:-1], others, bases[1:], strict=True)
    ]
