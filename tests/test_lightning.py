"""The LightningModule of examples/: the losses of a plain loop over the same batches."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedkl

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDED = ("lightning", "matplotlib")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice on workers and precision
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("lightning_distill")
    for name in ("lightning_distill", "common", "text"):
        sys.modules.pop(name, None)


def by_hand(common: Any, steps: int, rows: int, length: int, temperature: float) -> list[float]:
    language = common.load("tiny", 0)
    student, teacher = language.smaller(), language.model
    optimise = common.optimizer(student, 1e-2)
    losses = []
    for batch in language.batches(steps, rows, length, 0):
        with torch.no_grad():
            logits = teacher(batch.inputs)
        loss = fusedkl.forward_kl(
            student(batch.inputs), logits, temperature=temperature, reduction="mean"
        )
        optimise.zero_grad()
        loss.backward()
        optimise.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_same_losses_as_a_plain_loop(example: Any, tmp_path: Path) -> None:
    found = example.main(["--model", "tiny", "--steps", "6", "--out", str(tmp_path)])["loss"]
    wanted = by_hand(sys.modules["common"], 6, example.ROWS, example.LENGTH, example.TEMPERATURE)
    assert len(set(wanted)) == 6 and found == pytest.approx(wanted, rel=1e-6)
    assert (tmp_path / "lightning_distill.png").exists()
