"""The kernels' polynomials have the relative errors that docs/numerics.md states."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parents[1] / "csrc"
MATH, FRAME = CSRC / "row_math.h", CSRC / "cpu" / "gradient_frame.h"
BLOCK = CSRC / "cpu" / "block_kernels.h"


def g_over_square(u: Tensor) -> Tensor:
    """(e^u - 1 - u) / u^2, whose terms cancel near 0."""
    series = sum(u**k / torch.lgamma(torch.tensor(k + 3.0).double()).exp() for k in range(12))
    assert isinstance(series, Tensor)
    return torch.where(u.abs() < 0.2, series, (torch.expm1(u) - u) / (u * u))


def listed(file: Path, name: str) -> Tensor:
    (found,) = re.findall(rf"\b{name}\[\] = {{(.*?)}}", file.read_text(), flags=re.DOTALL)
    numbers = re.sub(r"//.*", "", found).replace("f", "").split(",")
    return torch.tensor([float(number) for number in numbers]).double()


def coarse_exp2() -> Tensor:
    """From the function that holds them, highest first."""
    (body,) = re.findall(r"exp2_coarse\(vf t\) {(.*?)}", BLOCK.read_text(), flags=re.DOTALL)
    return torch.tensor([float(n) for n in re.findall(r"set1\(([\d.]+)f\)", body)][::-1]).double()


def value(coefficients: Tensor, at: Tensor) -> Tensor:
    out = torch.zeros_like(at)
    for c in coefficients.flip(0):
        out = out * at + c
    return out


# name -> (coefficients, range, what they stand for, largest relative error)
CASES: dict[str, tuple[Tensor, tuple[float, float], Callable[[Tensor], Tensor], float]] = {
    "|u| <= 0.5": (listed(MATH, "kPoly4"), (-0.5, 0.5), g_over_square, 8e-7),
    "|u| <= 1": (listed(MATH, "kPoly6"), (-1, 1), g_over_square, 1.1e-7),
    "|u| <= 2": (listed(MATH, "kPoly8"), (-2, 2), g_over_square, 1.2e-7),
    "2^r": (listed(MATH, "kExp2"), (0, 1), torch.exp2, 1.2e-7),
    "2^r of 16 bits": (coarse_exp2(), (0, 1), torch.exp2, 7.6e-5),
}


@pytest.mark.parametrize("name", CASES)
def test_its_error(name: str) -> None:
    coefficients, (low, high), function, bound = CASES[name]
    at = torch.linspace(low, high, 20_001, dtype=torch.float64)
    true = function(at)
    error = float(((value(coefficients, at) - true).abs() / true).max())
    assert bound / 4 < error <= 1.05 * bound, error


@pytest.mark.parametrize(("name", "reach"), [("kCoarse2", 0.25), ("kCoarse3", 1.0)])
def test_coarse_gradients(name: str, reach: float) -> None:
    """e^l - 1 = l + l^2 P(l), to 9e-5."""
    at = torch.linspace(-reach, reach, 20_000, dtype=torch.float64)
    found = at + at * at * value(listed(FRAME, name), at)
    error = float((found / torch.expm1(at) - 1).abs().max())
    assert 1e-6 < error <= 9.5e-5, error
