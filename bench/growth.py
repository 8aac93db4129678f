"""Cost per pair over shapes: V from 1k to 1M, rows from 1 to 64k, everything read from memory."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

import cases
import contenders
import speed
import timing
import torch
from cases import DTYPES, NARROW
from goals import Result
from jobs_io import Reporter
from timing import Spread, Step
from torch import Tensor

import fusedkl

VOCABULARIES = (1024, 4096, 32768, 131072, 262144, 1 << 20)
ROWS = (1, 4, 16, 256, 4096, 65536)
LEAST_PAIRS = 100_000


@dataclass
class Cell:
    """One shape: slices of one big buffer, walked so that no call finds its rows in a cache."""

    name: str
    slices: list[tuple[Tensor, Tensor]]
    pairs: int
    at: int = 0

    def call(self) -> Tensor:
        policy, reference = self.slices[self.at]
        self.at = (self.at + 1) % len(self.slices)
        return fusedkl.divergence(policy, reference, "forward_kl")


def cells(policy: Tensor, reference: Tensor, vocabularies: tuple[int, ...]) -> list[Cell]:
    """Every shape with at least LEAST_PAIRS pairs that fits the two flat buffers."""
    found = []
    for vocabulary in vocabularies:
        for rows in ROWS:
            pairs = rows * vocabulary
            count = policy.numel() // pairs
            if pairs < LEAST_PAIRS or count == 0:
                continue
            cut = [
                (
                    policy[i * pairs : (i + 1) * pairs].view(rows, vocabulary),
                    reference[i * pairs : (i + 1) * pairs].view(rows, vocabulary),
                )
                for i in range(count)
            ]
            found.append(Cell(f"{rows}x{vocabulary}", cut, pairs))
    return found


def run(reporter: Reporter, settings: speed.Settings) -> None:
    """Flatness = the dearest shape over the cheapest, in ns per pair; a ratio per round."""
    for dtype, torch_dtype in DTYPES.items():
        reporter.step(f"{dtype}: making logits")
        vocabularies = VOCABULARIES[:2] if settings.quick else VOCABULARIES
        width = 1 << 17
        rows = 16 if settings.quick else max(512, cases.rows_for(width, torch_dtype, False))
        problem = cases.make(NARROW, width, rows, dtype)
        ours = contenders.ours(dtype)
        if not speed.Measurement(problem, settings, reporter).right("flatness", False, ours):
            continue
        shapes = cells(problem.policy.view(-1), problem.reference.view(-1), vocabularies)
        samples: dict[str, list[float]] = {cell.name: [] for cell in shapes}
        with torch.no_grad():
            for turn in range(settings.rounds + 1):
                reporter.step(f"{dtype}: {len(shapes)} shapes, round {turn}")
                for cell in shapes:
                    # 4M pairs or one call, whichever is more.
                    calls = max(1, (1 << 22) // cell.pairs)
                    seconds = timing.sample(Step(cell.call), timing.CPU, calls)
                    if turn:  # the first round warms up
                        samples[cell.name].append(seconds / cell.pairs * 1e9)
        reporter.emit(_flatness(dtype, samples))
        if not settings.quick:
            reporter.emit(_row_cost(dtype, samples))
    _call_cost(reporter)


def _flatness(dtype: str, samples: dict[str, list[float]]) -> Result:
    costs = {name: Spread.of(values).median for name, values in samples.items()}
    cheapest, dearest = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
    by_round = Spread.of([b / a for a, b in zip(samples[cheapest], samples[dearest], strict=True)])
    return Result(
        "flatness",
        f"{dtype}, {len(costs)} shapes",
        costs[dearest] / costs[cheapest],
        by_round.low,
        by_round.high,
        note=f"{costs[cheapest]:.3f} ns at {cheapest} to {costs[dearest]:.3f} ns at {dearest}",
        detail=dict(costs),
    )


def _row_cost(dtype: str, samples: dict[str, list[float]]) -> Result:
    """What a row of 1024 costs beside its pairs, where calls are too long to cost anything."""
    short, long = samples["65536x1024"], samples["256x262144"]
    spread = Spread.of([1024 * (a - b) / 1e3 for a, b in zip(short, long, strict=True)])
    note = "65536x1024 less 256x262144, per row"
    return Result("row_cost", dtype, spread.median, spread.low, spread.high, note=note)


def _call_cost(reporter: Reporter) -> None:
    """What a call costs before it does anything worth timing, and what of it is the operator's."""
    for dtype in DTYPES:
        problem = cases.make(NARROW, 1024, 1, dtype)
        call = functools.partial(fusedkl.divergence, problem.policy, problem.reference)
        chosen = fusedkl.explain(problem.policy, problem.reference).chosen
        operator = importlib.import_module("fusedkl.backends").kernels(chosen).row_stats
        one = problem.policy[:, :1], problem.reference[:, :1]
        alone = functools.partial(operator, *one, None, ["forward_kl"], *[None] * 5)
        for goal, function, note in (
            ("call_cost", call, "divergence(policy, reference)"),
            ("operator_cost", alone, "the kernels' operator called from Python, its two results"),
        ):
            step = Step(function)
            calls = timing.calls_for(step, timing.CPU, 0.01)
            spread = Spread.of([timing.sample(step, timing.CPU, calls) * 1e6 for _ in range(20)])
            reporter.emit(Result(goal, dtype, spread.median, spread.low, spread.high, note=note))
