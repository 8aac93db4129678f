"""The promise of accuracy over all scenario families, as the benchmark judges it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_modules import accuracy, goals

import fusedkl
from fusedkl.backends import BACKENDS

WHY_NOT = BACKENDS["cpu"].why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def missed(quick: bool) -> list[Any]:
    """The worst of each direction and dtype that is not as it must be; quick: only V = 4099."""
    results: list[Any] = []
    reporter = SimpleNamespace(step=lambda name: None, emit=results.append)
    accuracy.run(reporter, SimpleNamespace(quick=quick))
    assert len(results) > 8
    bounds = [goals.GOALS[r.goal].must for r in results]
    return [
        r
        for r, must in zip(results, bounds, strict=True)
        if r.wrong or (must is not None and not (r.value is not None and r.value <= must))
    ]


@pytest.mark.slow
def test_every_scenario() -> None:
    assert missed(quick=True) == []


@pytest.mark.full
def test_every_scenario_of_a_large_vocabulary() -> None:
    assert missed(quick=False) == []


@pytest.mark.slow
def test_a_planted_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what is allowed, in one direction."""
    true, whole = fusedkl.divergence, accuracy.families.scenarios
    few = lambda vocabulary: itertools.islice(whole(vocabulary), 9, 12)  # noqa: E731
    monkeypatch.setattr(accuracy.families, "scenarios", few)

    def wrong(x: Any, y: Any, kind: str) -> Any:
        found = true(x, y, kind)
        return found * (1 + 2e-5) if kind == "reverse_kl" else found

    monkeypatch.setattr(fusedkl, "divergence", wrong)
    found = {(r.goal, r.case.split()[0]) for r in missed(quick=True)}
    assert ("kl_error", "reverse_kl") in found and ("kl_error", "forward_kl") not in found
