"""Scenario families by magnitude: what rows of logits look like in use and in trouble.

Each scenario is a pair of rows in float64, to be rounded to the dtype under test; the truth is then
taken from the rounded rows, so that a family means the same for every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

NEG_INF = float("-inf")
MAGNITUDES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 4.0, 10.0, 30.0)
FEW = (1e-3, 0.1, 1.0, 8.0)


@dataclass(frozen=True)
class Scenario:
    name: str
    policy: Tensor
    reference: Tensor


class _Draw:
    """Named draws from one generator, so that families stay readable."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self.v = vocabulary
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, sigma: float = 1.0) -> Tensor:
        return torch.randn(self.v, generator=self.generator, dtype=torch.float64) * sigma

    def uniform(self) -> Tensor:
        return torch.rand(self.v, generator=self.generator, dtype=torch.float64)

    def index(self) -> int:
        return int(torch.randint(self.v, (), generator=self.generator))

    def peak(self, at: int, sigma: float = 2.0, height: float = 28.0) -> Tensor:
        row = self.normal(sigma)
        row[at] = height
        return row


def _bases(draw: _Draw) -> dict[str, Tensor]:
    top = draw.normal()
    top[torch.randperm(draw.v, generator=draw.generator)[:50]] += 12
    return {
        "flat": draw.normal(),
        "uniform": torch.zeros(draw.v, dtype=torch.float64),
        "n3": draw.normal(3),
        "peak": draw.peak(draw.index()),
        "peak in the last block": draw.peak(draw.v - 3),
        "sorted": draw.normal(3).sort().values,
        "drift": torch.linspace(-10, 10, draw.v, dtype=torch.float64) + draw.normal(0.5),
        "top 50": top,
    }


def scenarios(vocabulary: int, seed: int = 0) -> Iterator[Scenario]:
    """About 150 scenarios, KL from below 1e-12 to above 1e3."""
    draw = _Draw(vocabulary, seed)
    for base, y in _bases(draw).items():
        for s in MAGNITUDES:
            yield Scenario(f"{base}, all {s:g}", y + draw.normal(s), y)
        for s in FEW:
            one, top = y.clone(), y.clone()
            one[draw.index()] += s
            top[y.argmax()] += s
            yield Scenario(f"{base}, one token {s:g}", one, y)
            yield Scenario(f"{base}, top token {s:g}", top, y)
    yield from _shifted(draw)
    yield from _masked(draw)
    yield from _uneven(draw)


def _shifted(draw: _Draw) -> Iterator[Scenario]:
    """Differences that are mostly a constant, which must cancel."""
    half = torch.arange(draw.v) < draw.v // 2
    for offset in (0.5, 0.3, 1e4, -3e3):
        for s in (1e-3, 1e-2, 1.0):
            y = draw.normal(3)
            yield Scenario(f"offset {offset:g}, all {s:g}", y + offset + draw.normal(s), y)
    for s in (1e-4, 0.1, 30.0):
        y = draw.normal()
        yield Scenario(f"one half moved by {s:g}", y + s * half, y)
    y = draw.normal(3)
    yield Scenario("stairs of growing peaks", y + torch.arange(draw.v) * 12 // draw.v * 2.5, y)


def _masked(draw: _Draw) -> Iterator[Scenario]:
    """-inf in both rows, and in one: one direction is then infinite and must say so."""
    rank = draw.normal(3)
    keep = {
        "random half": draw.uniform() < 0.5,
        "both ends": (torch.arange(draw.v) > 700) & (torch.arange(draw.v) < draw.v - 700),
        "all but the top 50": rank >= rank.sort().values[-50],
        "one block only": (torch.arange(draw.v) // 2048) == (draw.v // 4096),
    }
    for name, kept in keep.items():
        for s in (1e-3, 0.1, 4.0):
            x, y = rank + draw.normal(s), rank.clone()
            x[~kept] = y[~kept] = NEG_INF
            yield Scenario(f"mask {name}, all {s:g}", x, y)
    x, y = rank + draw.normal(0.1), rank.clone()
    y[::7] = NEG_INF
    yield Scenario("only the policy covers a seventh", x, y)
    x, y = rank + draw.normal(0.1), rank.clone()
    x[::7] = NEG_INF
    yield Scenario("only the reference covers a seventh", x, y)


def _uneven(draw: _Draw) -> Iterator[Scenario]:
    """Small and large differences in one row, masses that move, tails that underflow."""
    for s in (1e-3, 0.1):
        cauchy = torch.tan((draw.uniform() - 0.5) * torch.pi).clamp(-200, 200)
        y = draw.normal(3)
        yield Scenario(f"cauchy {s:g}", y + s * cauchy, y)
    y = draw.normal(3)
    yield Scenario("log-uniform noise", y + draw.normal() * 10 ** (4 * draw.uniform() - 4), y)
    for u in (-30.0, 3.0, 12.0, 40.0, 100.0):
        y = draw.normal(3)
        x = y + draw.normal(0.01)
        x[::1000] += u
        yield Scenario(f"outliers of {u:g} every 1000", x, y)
    a, b = draw.index(), draw.index()
    yield Scenario("two peaks swapped", draw.peak(a, height=30), draw.peak(b, height=30))
    y = draw.normal(3)
    for u in (40.0, 80.0):
        x = y.clone()
        x[a] += u
        yield Scenario(f"policy collapsed by {u:g}", x, y)
    x = (y := draw.peak(b)).clone()
    x[b] -= 60
    yield Scenario("top token removed", x, y)
    y = draw.normal(3)
    y[: draw.v // 2] -= 120
    x = y.clone()
    x[: draw.v // 2] += 118
    yield Scenario("policy mass where the reference underflows", x, y)
    y = draw.normal(1e-3)
    yield Scenario("exponent gaps", y + 2.0 ** draw.normal(6).clamp(-30, 3), y)
    for s in (100.0, 300.0):
        y = draw.normal(3)
        yield Scenario(f"far apart, all {s:g}", y + draw.normal(s), y)
