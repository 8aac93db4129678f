"""Each cell of docs/estimators.md, by enumeration of a small vocabulary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fusedkl

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "estimators.md").read_text()
SECTIONS = {
    part.split("\n", 1)[0]: re.findall(r"^\| (.+) \|$", part, flags=re.MULTILINE)[1:]
    for part in PAGE.split("\n## ")[1:]
}
ON, REWARD, OFF = (
    "Tokens drawn from the policy itself",
    "In the reward",
    "Tokens drawn from an older policy",
)
ROWS = [(section, *row.split(" | ")) for section in (ON, REWARD, OFF) for row in SECTIONS[section]]


class Vocabulary:
    def __init__(self) -> None:
        self.x, y, old = torch.randn(3, 7, dtype=torch.float64)
        self.x.requires_grad_()
        self.log_p, self.log_q = self.x.log_softmax(-1), y.log_softmax(-1)
        self.log_old = old.log_softmax(-1)
        p, q = self.log_p.exp(), self.log_q.exp()
        self.values = {
            "reverse KL": (p * (self.log_p - self.log_q)).sum(),
            "forward KL": (q * (self.log_q - self.log_p)).sum(),
        }

    def slope(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.x, retain_graph=True)[0]

    def mean(self, section: str, loss: str) -> Tensor:
        """Over all tokens, each as often as it would be drawn."""
        *factor, kind = loss.split(" ")
        estimate = fusedkl.kl_estimate(self.log_p, self.log_q, kind)
        if section == REWARD:
            return (self.log_p.detach().exp() * estimate.detach() * self.log_p).sum()
        if section == ON:
            return (self.log_p.detach().exp() * estimate).sum()
        w = (self.log_p - self.log_old).exp()
        if factor != ["w"]:
            w = w.detach() if factor == ["sg(w)"] else torch.ones_like(w)
        return (self.log_old.exp() * w * estimate).sum()


def verdict(found: Tensor, candidates: dict[str, Tensor], otherwise: str) -> str:
    if bool((found.abs() < 1e-12).all()):
        return "0"
    for name, value in candidates.items():
        if torch.allclose(found, value, rtol=1e-9, atol=0):
            return name
        assert (found - value).norm() > 0.01 * value.norm(), "too close to call"
    return otherwise


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_the_tables_say_what_enumeration_finds(row: tuple[str, ...]) -> None:
    section, loss, *cells = row
    vocabulary = Vocabulary()
    mean = vocabulary.mean(section, loss)
    slopes = {name: vocabulary.slope(value) for name, value in vocabulary.values.items()}
    assert verdict(vocabulary.slope(mean), slopes, "neither") == cells.pop()
    if cells:
        assert verdict(mean, vocabulary.values, "biased") == cells.pop()


def test_every_kind_is_in_the_first_table() -> None:
    kinds = [row[1] for row in ROWS if row[0] == ON]
    assert sorted(kinds) == sorted(["k1", "k2", "k3", "abs", "k1+", "k3+"])
    assert len(ROWS) == 19
