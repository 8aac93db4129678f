"""The timed comparisons with one thread: forward, and forward + backward, against the peers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import cases
import contenders
import limits
import machine
import timing
import torch
from cases import DTYPES, NARROW, Problem
from contenders import Contender
from goals import Result
from jobs_io import Reporter
from timing import Comparison, Spread, Step


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    quick: bool
    rounds: int = 5
    seconds: float = 4.0
    slow_rounds: int = 3


def problems(settings: Settings, reporter: Reporter, only_first: bool = False) -> Iterator[Problem]:
    """Every dtype at every vocabulary, one at a time: each is a few hundred MiB."""
    for vocabulary in cases.vocabularies(settings.quick).values():
        if only_first and vocabulary != first(settings):
            return
        for dtype in DTYPES:
            reporter.step(f"{dtype} V = {vocabulary}: making logits")
            rows = cases.rows_for(vocabulary, DTYPES[dtype], settings.quick)
            yield cases.make(NARROW, vocabulary, rows, dtype)


def first(settings: Settings) -> int:
    """The vocabulary for what is measured at one only, to keep the whole run short."""
    return next(iter(cases.vocabularies(settings.quick).values()))


def short(problem: Problem) -> str:
    return problem.name.removesuffix(" " + NARROW)


def per_pair(spread: Spread, problem: Problem) -> float:
    """Nanoseconds per pair of logits."""
    return spread.median / problem.pairs * 1e9


class Measurement:
    """One problem: checks a contender's numbers first, then times it beside ours."""

    def __init__(self, problem: Problem, settings: Settings, reporter: Reporter) -> None:
        self.problem, self.settings, self.reporter = problem, settings, reporter
        self.expected = problem.expected_rows()
        self._checked: dict[tuple[Contender, bool], str] = {}

    def right(self, goal: str, backward: bool, *checked: Contender) -> bool:
        """Whether all compute the right numbers; the first that does not is reported."""
        for contender in checked:
            key = contender, backward
            if key not in self._checked:
                self._checked[key] = contenders.check(
                    contender, self.problem, self.expected, backward
                )
            wrong = self._checked[key]
            if wrong:
                self.reporter.emit(Result(goal, short(self.problem), wrong=wrong))
                return False
        return True

    def versus(
        self,
        goal: str,
        ours: Contender,
        other: Contender,
        backward: bool,
        rounds: int | None = None,
        limit: float | None = None,
        clock: timing.Clock = timing.CPU,
    ) -> Comparison | None:
        """How many times faster ours is. `limit` is the seconds the memory alone would take."""
        self.reporter.step(f"{short(self.problem)}: {ours.name} vs {other.name}")
        if not self.right(goal, backward, ours, other):
            return None
        result = timing.compare(
            contenders.steps(ours, self.problem, backward),
            contenders.steps(other, self.problem, backward),
            rounds=rounds or self.settings.rounds,
            seconds=self.settings.seconds,
            clock=clock,
        )
        a, b = per_pair(result.base, self.problem), per_pair(result.other, self.problem)
        ceiling = result.other.median / limit if limit else None
        note = f"{a:.3f} vs {b:.3f} ns/pair, {other.name}"
        if ceiling:
            note += f"; memory allows {ceiling:.1f}x"
        self.reporter.emit(
            Result(
                goal,
                short(self.problem),
                result.ratio.median,
                result.ratio.low,
                result.ratio.high,
                ceiling,
                note=note,
                detail={"other": other.name, **_nanoseconds(result, self.problem)},
            )
        )
        return result

    def read_limit(self, goal: str, ours: Contender) -> float | None:
        """Emit how many times the memory-read limit ours takes; returns the limit in seconds.

        What is returned serves as a bound on others, so it is the least time seen, not the median.
        """
        self.reporter.step(f"{short(self.problem)}: memory-read limit")
        if not self.right(goal, False, ours):
            return None
        name, probe = limits.read_probe(self.problem)
        result = timing.compare(
            probe,
            contenders.steps(ours, self.problem, backward=False),
            rounds=self.settings.rounds,
            seconds=self.settings.seconds,
        )
        rate = limits.bytes_read(self.problem) / result.base.median / 1e9
        self._emit_limit(goal, result, f"{rate:.1f} GB/s by {name}", rate)
        return result.base.least

    def write_limit(self, goal: str, ours: Contender) -> None:
        """Emit how many times the limit of two reads and one write ours takes."""
        self.reporter.step(f"{short(self.problem)}: read and write limit")
        if not self.right(goal, True, ours):
            return
        name, probe = limits.write_probe(self.problem, torch.zeros_like(self.problem.policy))
        result = timing.compare(
            probe,
            contenders.steps(ours, self.problem, backward=True),
            rounds=self.settings.rounds,
            seconds=self.settings.seconds,
        )
        rate = limits.bytes_read(self.problem) * 1.5 / result.base.median / 1e9
        self._emit_limit(goal, result, f"{rate:.1f} GB/s by {name}, memory already mapped", rate)

    def fresh_write(self, goal: str) -> None:
        """Emit what the first writing of a gradient's memory costs, with no arithmetic at all."""
        self.reporter.step(f"{short(self.problem)}: fresh memory")
        step = Step(lambda: torch.empty_like(self.problem.policy).fill_(1))
        timing.sample(step, timing.CPU, 1)
        scale = 1e9 / self.problem.pairs
        found = Spread.of([timing.sample(step, timing.CPU, 1) * scale for _ in range(9)])
        case = short(self.problem)
        self.reporter.emit(Result(goal, case, found.median, found.low, found.high))

    def _emit_limit(self, goal: str, result: Comparison, how: str, rate: float) -> None:
        ours, limit = per_pair(result.other, self.problem), per_pair(result.base, self.problem)
        self.reporter.emit(
            Result(
                goal,
                short(self.problem),
                result.ratio.median,
                result.ratio.low,
                result.ratio.high,
                note=f"{ours:.3f} vs {limit:.3f} ns/pair, {how}",
                detail={"ours_ns": ours, "limit_ns": limit, "limit_GB_per_s": rate},
            )
        )


def _nanoseconds(result: Comparison, problem: Problem) -> dict[str, float | str]:
    """Per pair, minima beside the medians: the two together tell how noisy the machine was."""
    scale = 1e9 / problem.pairs
    return {
        "ours_ns": per_pair(result.base, problem),
        "other_ns": per_pair(result.other, problem),
        "ours_least_ns": result.base.least * scale,
        "other_least_ns": result.other.least * scale,
        "rounds": float(result.rounds),
    }


def run_forward(reporter: Reporter, settings: Settings) -> None:
    """Forward against the memory, the compiler, upcast eager and the row loop."""
    for problem in problems(settings, reporter):
        dtype, ours = problem.dtype, contenders.ours(problem.dtype)
        here = Measurement(problem, settings, reporter)
        limit = here.read_limit(f"forward_limit/{dtype}", ours)
        reporter.step(f"{short(problem)}: compiling the peer")
        peer = contenders.compiled(problem, backward=False)
        here.versus(f"forward_compile/{dtype}", ours, peer, False, limit=limit)
        slow = settings.slow_rounds
        here.versus(f"forward_eager/{dtype}", ours, contenders.EAGER, False, slow, limit)
        if problem.vocabulary == first(settings):
            here.versus(f"forward_rowloop/{dtype}", ours, contenders.ROW_LOOP, False, slow, limit)


def run_backward(reporter: Reporter, settings: Settings) -> None:
    """Forward + backward; the environment of the process decides about pages and kept memory."""
    pages = "plain" if os.environ.get("FUSEDKL_HUGE_PAGES") == "0" else "huge"
    if os.environ.get("FUSEDKL_KEEP_MEMORY") == "0":
        pages = "returned"
    for problem in problems(settings, reporter, only_first=pages == "returned"):
        dtype, ours = problem.dtype, contenders.ours(problem.dtype)
        here = Measurement(problem, settings, reporter)
        if pages == "returned":
            peer = contenders.compiled(problem, backward=True)
            here.versus(f"backward_compile_returned/{dtype}", ours, peer, True)
            continue
        if pages == "huge":
            here.write_limit(f"backward_limit/{dtype}", ours)
        here.fresh_write(f"fresh_write_{pages}/{dtype}")
        reporter.step(f"{short(problem)}: compiling the peer")
        peer = contenders.compiled(problem, backward=True)
        here.versus(f"backward_compile_{pages}/{dtype}", ours, peer, True)
        inplace = contenders.ours_inplace(dtype)
        here.versus(f"inplace_compile_{pages}/{dtype}", inplace, peer, True)
        if pages == "plain" and problem.vocabulary == first(settings):
            here.versus(
                f"backward_eager/{dtype}", ours, contenders.EAGER, True, settings.slow_rounds
            )


def run_avx2(reporter: Reporter, settings: Settings) -> None:
    """Both sides held to AVX2 by the environment of this process; says so if one is not."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    torch._inductor.config.cpp.simdlen = 256
    peer_bits, eager = pick_vec_isa().bit_width(), torch.backends.cpu.get_cpu_capability()
    wrong = ""
    if machine.instruction_set() != "avx2":
        wrong = f"ours runs {machine.instruction_set()}, not avx2"
    elif peer_bits != 256 or eager != "AVX2":
        wrong = f"the peer compiles for {peer_bits}-bit vectors, torch runs {eager}"
    for problem in problems(settings, reporter, only_first=True):
        if wrong:
            reporter.emit(Result("avx2_forward", short(problem), wrong=wrong))
            return
        ours, here = contenders.ours(problem.dtype), Measurement(problem, settings, reporter)
        for goal, backward in (("avx2_forward", False), ("avx2_backward", True)):
            reporter.step(f"{short(problem)}: compiling the peer for AVX2")
            here.versus(goal, ours, contenders.compiled(problem, backward), backward)
