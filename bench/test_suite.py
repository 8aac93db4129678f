"""One test per case and contender: right first, then timed by pytest-benchmark.

    pytest bench/ --benchmark-only [--suite full] [--device cuda]

Its times are not interleaved; `bench/run.py --models` is for comparisons.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from suite import judge, measure
from suite.batch import Batch, Case, build
from suite.contenders import makers


@functools.lru_cache(maxsize=1)
def _prepared(case: Case, device: str) -> tuple[Batch, judge.Truth]:
    batch = build(case, device)
    return batch, judge.truth(case, batch)


def test_suite(benchmark: Any, case: Case, contender: str, pytestconfig: pytest.Config) -> None:
    device: str = pytestconfig.getoption("device")
    if not measure.fits(case, contender, device):
        pytest.skip("does not fit this machine's memory")
    if device == "cpu":
        torch.set_num_threads(1)
    batch, truth = _prepared(case, device)
    made = makers(case, device)[contender](case)
    if slow := measure.too_slow(made, case, batch, device):
        pytest.skip(slow)
    errors = judge.judge(made, case, batch, truth)
    benchmark.group = case.name
    benchmark.extra_info |= {"value_error": errors.value, "gradient_error": errors.gradient}
    if errors.wrong:
        assert not contender.startswith("fusedkl"), errors.wrong
        pytest.skip(f"wrong, so not timed: {errors.wrong}")
    step = measure.step(made, case, batch, device)

    def run() -> None:
        step.run()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, setup=step.before, rounds=5, warmup_rounds=1)
