"""The benchmark's own logic: interleaved ratios, verdicts, the table and the JSON."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from bench_modules import goals, jobs_io, report, timing

Result = goals.Result


class FakeClock:
    """Time that only the timed functions move, in nanoseconds."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def step(self, cost: float) -> timing.Step:
        def run() -> None:
            self.now += round(cost * 1e9)

        return timing.Step(run)


# -- timing --------------------------------------------------------------------------------------


def test_ratio_is_to_the_mean_of_the_neighbours() -> None:
    assert timing.ratios([1.0, 3.0, 5.0], [4.0, 4.0]) == [2.0, 1.0]


def test_ratios_reject_a_missing_base_sample() -> None:
    with pytest.raises(ValueError, match="bases must be one more"):
        timing.ratios([1.0, 1.0], [1.0, 1.0])


def test_quantiles_interpolate() -> None:
    assert timing.quantile([4.0, 0.0, 2.0], 0.5) == 2.0
    assert timing.quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert timing.quantile([7.0], 0.9) == 7.0


def test_drift_cancels_in_the_ratio() -> None:
    """A machine that slows down steadily changes both sides alike."""
    clock = FakeClock()
    slowness = 1.0

    def costing(cost: float) -> timing.Step:
        def run() -> None:
            nonlocal slowness
            slowness *= 1.02
            clock.now += round(cost * slowness * 1e9)

        return timing.Step(run)

    result = timing.compare(costing(0.1), costing(0.3), clock=clock, rounds=9)
    assert result.ratio.median == pytest.approx(3.0, rel=1e-3)
    assert result.other.median / result.base.least > 3.3  # what an uninterleaved pair would say


def test_samples_of_short_calls_are_made_long_enough() -> None:
    clock = FakeClock()
    assert timing.calls_for(clock.step(1e-3), clock, 0.02) == 20
    assert timing.calls_for(clock.step(0.5), clock, 0.02) == 1


def test_preparation_is_neither_timed_nor_shared_by_calls() -> None:
    clock, prepared = FakeClock(), []

    def before() -> None:
        clock.now += 10**9
        prepared.append(clock.now)

    step = timing.Step(clock.step(1e-3).run, before, repeatable=False)
    assert timing.calls_for(step, clock, 0.02) == 1
    assert timing.sample(step, clock) == pytest.approx(1e-3)
    assert len(prepared) == 2


def test_fastest_takes_the_least() -> None:
    clock = FakeClock()
    assert timing.fastest({"a": clock.step(2.0), "b": clock.step(1.0)}, clock) == "b"


# -- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7.5, goals.AIM),
        (7.4, goals.MUST),
        (5.0, goals.MUST),
        (4.99, goals.MISSED),
        (math.nan, goals.MISSED),
    ],
)
def test_verdict_where_more_is_better(value: float, expected: str) -> None:
    assert goals.verdict(Result("forward_compile/bf16", "x", value, isa="avx512")) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(1.3, goals.AIM), (1.9, goals.MUST), (1.91, goals.MISSED)]
)
def test_verdict_where_less_is_better(value: float, expected: str) -> None:
    assert goals.verdict(Result("forward_limit/bf16", "x", value, isa="avx512")) == expected


def test_verdict_of_a_must_beyond_memory() -> None:
    result = Result("forward_compile/bf16", "x", 3.0, ceiling=3.4, isa="avx512")
    assert goals.verdict(result) == goals.OUT_OF_REACH
    assert report.failures([result], True, within_reach=False) == [result]
    assert report.failures([result], True, within_reach=True) == []
    result.ceiling = 6.0
    assert goals.verdict(result) == goals.MISSED
    assert report.failures([result], True, within_reach=True) == [result]


def test_other_instruction_sets_and_small_sizes_do_not_fail() -> None:
    result = Result("forward_compile/bf16", "x", 1.0, isa="avx2")
    assert goals.verdict(result) == goals.ELSEWHERE[goals.MISSED]
    assert report.failures([result], True, within_reach=False) == []
    result.isa = "avx512"
    assert goals.verdict(result, judged=False) == goals.NOT_JUDGED
    assert report.failures([result], False, within_reach=False) == []


def test_wrong_numbers_fail_whatever_the_suite() -> None:
    result = Result("forward_compile/bf16", "x", wrong="value 2, expected 1", isa="avx512")
    assert goals.verdict(result, judged=False) == goals.WRONG
    assert report.failures([result], False, within_reach=True) == [result]


def test_a_goal_without_a_must_is_reported() -> None:
    assert goals.verdict(Result("threads_row", "x", 0.1, isa="avx512")) == goals.REPORTED


def test_every_aim_is_at_least_as_hard_as_its_must() -> None:
    for name, goal in goals.GOALS.items():
        assert (goal.must is None) == (goal.aim is None), name
        if goal.must is not None and goal.aim is not None:
            sign = 1 if goal.higher_is_better else -1
            assert sign * goal.aim >= sign * goal.must, name


# -- reporting -----------------------------------------------------------------------------------


def test_results_survive_the_pipe_and_noise_does_not() -> None:
    stream = io.StringIO()
    reporter = jobs_io.Reporter("avx512", stream)
    reporter.step("compiling")
    result = Result("wide_1", "bf16", 1.5, 1.4, 1.6, note="a\nb")
    reporter.emit(result)
    first, second = stream.getvalue().splitlines(keepends=True)
    assert jobs_io.parse(first) == "compiling"
    assert jobs_io.parse(second) == Result(
        "wide_1", "bf16", 1.5, 1.4, 1.6, note="a\nb", isa="avx512"
    )
    assert jobs_io.parse("a compiler says hello\n") is None


def test_table_and_json_say_the_same(tmp_path: Path) -> None:
    results = [
        Result("wide_1", "bf16", 9.0, 8.0, 10.0, isa="avx512"),
        Result("forward_compile/bf16", "bf16", 8.0, 7.0, 9.0, isa="avx512"),
    ]
    text = report.table(results, judged=True)
    assert text.index("forward vs torch.compile") < text.index("wide differences")
    assert goals.MISSED in text and goals.AIM in text and ">= 5x" in text
    path = tmp_path / "deep" / "bench.json"
    report.write(path, results, True, {"commit": "abc"})
    content = json.loads(path.read_text())
    assert content["commit"] == "abc"
    assert [entry["verdict"] for entry in content["results"]] == [goals.MISSED, goals.AIM]
    assert content["goals"]["wide_1"]["must"] == 1.6
    assert report.summary(results, True) == f"1 {goals.MISSED}, 1 {goals.AIM}"
