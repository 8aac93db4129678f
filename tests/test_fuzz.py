"""The fuzz target runs, and sees what is planted."""

from __future__ import annotations

from typing import Any

import fuzz
import fuzz_calls
import pytest
import torch

import fusedkl
from fusedkl.backends import BACKENDS

WHY_NOT = BACKENDS["cpu"].why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.mark.parametrize("family", fuzz_calls.FAMILIES)
def test_nothing_is_found(family: str) -> None:
    assert fuzz.run(family, 12, None) >= 5


@pytest.mark.full
@pytest.mark.parametrize("family", fuzz_calls.FAMILIES)
def test_nothing_is_found_in_many_calls(family: str) -> None:
    assert fuzz.run(family, 500, 7) >= 500


@pytest.mark.slow
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row in a hundred calls is off by a thousandth, on one backend."""
    true = fusedkl.logsumexp

    def wrong(*positional: Any, backend: str, **named: Any) -> Any:
        found = true(*positional, backend=backend, **named)
        return found * 1.001 if backend == "cpu" and found.numel() == 3 else found

    monkeypatch.setattr(fusedkl, "logsumexp", wrong)
    with pytest.raises(AssertionError, match="off by"):
        fuzz.run("one_row", 2000, 0)  # ends with the first; which it is, differs by installation


@pytest.mark.slow
def test_a_changed_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true = fusedkl.entropy

    def wrong(logits: torch.Tensor, **named: Any) -> Any:
        with torch.no_grad():
            logits += 1
        return true(logits, **named)

    monkeypatch.setattr(fusedkl, "entropy", wrong)
    with pytest.raises(AssertionError, match="an input was changed"):
        fuzz.run("one_row", 200, 0)
