"""Two threads, on the wall clock: one long row, and the comparison with the compiler."""

from __future__ import annotations

import cases
import contenders
import timing
import torch
from cases import DTYPES, NARROW
from goals import Result
from jobs_io import Reporter
from speed import Measurement, Settings, problems, short
from timing import Step


def run(reporter: Reporter, settings: Settings) -> None:
    """Two threads on the wall clock; reported, because neighbours decide the outcome."""
    torch.set_num_threads(2)
    _long_row(reporter, settings)
    for problem in problems(settings, reporter, only_first=True):
        here, ours = Measurement(problem, settings, reporter), contenders.ours(problem.dtype)
        for goal, backward in (("threads_forward", False), ("threads_backward", True)):
            reporter.step(f"{short(problem)}: compiling the peer for two threads")
            peer = contenders.compiled(problem, backward, timing.WALL)
            here.versus(goal, ours, peer, backward, clock=timing.WALL)


def _long_row(reporter: Reporter, settings: Settings) -> None:
    for dtype in DTYPES:
        reporter.step(f"{dtype}: one row of 1M, one and two threads")
        problem = cases.make(NARROW, 1 << (12 if settings.quick else 20), 1, dtype)
        ours, here = contenders.ours(dtype), Measurement(problem, settings, reporter)
        for goal, backward in (("threads_row", False), ("threads_row_backward", True)):
            if here.right(goal, backward, ours):
                step = contenders.steps(ours, problem, backward)
                reporter.emit(_one_and_two(goal, short(problem), step, settings))


def _one_and_two(goal: str, case: str, step: Step, settings: Settings) -> Result:
    result = timing.compare(
        Step(step.run, before=lambda: torch.set_num_threads(2)),
        Step(step.run, before=lambda: torch.set_num_threads(1)),
        clock=timing.WALL,
        rounds=4 * settings.rounds,
        least_sample=0.005,
    )
    torch.set_num_threads(2)
    one, two = result.other, result.base
    return Result(
        goal,
        case,
        result.ratio.median,
        result.ratio.low,
        result.ratio.high,
        note=f"{one.median * 1e6:.0f} us on one, {two.median * 1e6:.0f} us on two; "
        f"of the minima {one.least / two.least:.2f}x",
    )
