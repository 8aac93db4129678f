"""What difficult inputs, a second direction and real logits cost."""

from __future__ import annotations

import cases
import contenders
import timing
from cases import DTYPES, NARROW, Problem
from goals import Result
from jobs_io import Reporter
from speed import Measurement, Settings, first, per_pair, short
from timing import Comparison


def run_inputs(reporter: Reporter, settings: Settings) -> None:
    """What difficult inputs and a second direction cost, against one direction on easy ones."""
    vocabulary = first(settings)
    for dtype, torch_dtype in DTYPES.items():
        rows = cases.rows_for(vocabulary, torch_dtype, settings.quick)
        ours = contenders.ours(dtype)
        easy = Measurement(cases.make(NARROW, vocabulary, rows, dtype), settings, reporter)
        base = contenders.steps(ours, easy.problem, backward=False)
        both = contenders.steps(contenders.BOTH, easy.problem, backward=False)
        reporter.step(f"{short(easy.problem)}: both directions")
        right = easy.right("both_directions", False, ours)
        wrong = contenders.check(contenders.BOTH, easy.problem, easy.problem.expected_both(), False)
        if wrong:
            reporter.emit(Result("both_directions", short(easy.problem), wrong=wrong))
        elif right:
            _emit_cost(reporter, "both_directions", easy.problem, timing.compare(base, both), "")
        for goal, kind in (
            ("wide_1", "noise 1"),
            ("wide_4", "noise 4"),
            ("wide_50", "noise 24"),
            ("wide_50", "collapsed"),
            ("half_masked", "half masked"),
            ("drifted", "drifted"),
        ):
            reporter.step(f"{dtype} V = {vocabulary}: {kind}")
            hard = Measurement(cases.make(kind, vocabulary, rows, dtype), settings, reporter)
            wrong = contenders.check(ours, hard.problem, hard.expected, backward=False)
            if wrong:
                reporter.emit(Result(goal, hard.problem.name, wrong=wrong))
                continue
            step = contenders.steps(ours, hard.problem, backward=False)
            result = timing.compare(base, step, rounds=settings.rounds, seconds=settings.seconds)
            least, most = float(hard.expected.min()), float(hard.expected.max())
            _emit_cost(reporter, goal, hard.problem, result, f"; KL {least:.2g} to {most:.2g}")


def _emit_cost(
    reporter: Reporter, goal: str, problem: Problem, result: Comparison, note: str
) -> None:
    easy, hard = per_pair(result.base, problem), per_pair(result.other, problem)
    measured, scale = result.ratio, 1.0
    if goal == "half_masked":
        measured, scale = result.other, 1e9 / problem.pairs
    reporter.emit(
        Result(
            goal,
            problem.name if goal != "both_directions" else short(problem),
            measured.median * scale,
            measured.low * scale,
            measured.high * scale,
            note=f"{hard:.3f} vs {easy:.3f} ns/pair{note}",
            detail={"ns": hard, "easy_ns": easy},
        )
    )


def run_real(reporter: Reporter, settings: Settings) -> None:
    """The same comparisons on logits of a language model over text."""
    import real_logits

    for dtype in DTYPES:
        reporter.step(f"{dtype}: running the language model")
        problem = real_logits.problem(dtype, settings.quick)
        here, ours = Measurement(problem, settings, reporter), contenders.ours(dtype)
        limit = here.read_limit("real_limit", ours)
        for goal, backward in (("real_forward", False), ("real_backward", True)):
            reporter.step(f"{problem.name}: compiling the peer")
            peer = contenders.compiled(problem, backward)
            here.versus(goal, ours, peer, backward, limit=None if backward else limit)
