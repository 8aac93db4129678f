"""fusedkl.kl_div against torch.nn.functional.kl_div: values and gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import (
    DTYPES,
    REDUCTIONS,
    compare,
    pair,
    quiet,
)

from fusedkl import kl_div

both_targets = pytest.mark.parametrize("log_target", [False, True], ids=["prob", "log"])
all_reductions = pytest.mark.parametrize("reduction", REDUCTIONS)
SHAPES = [(), (1,), (7,), (1, 1), (2, 3), (4, 33), (2, 3, 5), (1, 40), (3, 1)]


@both_targets
@all_reductions
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, reduction: str, log_target: bool
) -> None:
    x, t = pair(shape, dtype, log_target)
    compare(x, t, reduction=reduction, log_target=log_target)
    compare(x, t.detach(), reduction=reduction, log_target=log_target)
    compare(x.detach(), t, reduction=reduction, log_target=log_target)
    compare(x.detach(), t.detach(), reduction=reduction, log_target=log_target)


@both_targets
@pytest.mark.parametrize("dtype", DTYPES)
def test_none_has_torchs_bits(dtype: torch.dtype, log_target: bool) -> None:
    x, t = pair((5, 301), dtype, log_target)
    ours = kl_div(x, t, reduction="none", log_target=log_target)
    assert torch.equal(ours, F.kl_div(x, t, reduction="none", log_target=log_target))


@both_targets
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype: torch.dtype, reduction: str, log_target: bool) -> None:
    """One rounding of a float32 result, where torch rounds after every operation."""
    x, t = pair((6, 257), dtype, log_target)
    value = quiet(kl_div, x, t, reduction=reduction, log_target=log_target)
    gx, gt = torch.autograd.grad(value, (x, t))
    x64, t64 = (a.detach().double().requires_grad_() for a in (x, t))
    exact = quiet(F.kl_div, x64, t64, reduction=reduction, log_target=log_target)
    ex, et = torch.autograd.grad(exact, (x64, t64))
    assert value.dtype == gx.dtype == gt.dtype == dtype
    for ours, truth in ((value, exact), (gx, ex), (gt, et)):
        # half a unit in the last place; subnormals of float16 have the absolute one
        step = torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).smallest_normal / 512
        if ours is not value:
            step = step + 1e-6 * (truth.abs() + ex.abs())  # float32: log t + 1 may cancel x
        assert ((ours.double() - truth).abs() <= 0.51 * step).all()


def test_half_mean_does_not_overflow_on_the_way() -> None:
    x = torch.full((64, 4096), -4.0, dtype=torch.float16, requires_grad=True)
    t = torch.ones(64, 4096, dtype=torch.float16)
    assert quiet(kl_div, x, t) == 4.0 == quiet(F.kl_div, x, t)  # the sum is 2^20
    assert kl_div(x, t, reduction="batchmean") == 16384.0  # torch: inf
    kl_div(x, t, reduction="sum").mul(0.5).backward()
    assert (x.grad == -0.5).all()


# what batchmean divides by: size 0 of input itself, before broadcasting
@both_targets
@all_reductions
@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 5), (4, 5)),
        ((4, 5), (1, 5)),
        ((5,), (4, 5)),
        ((4, 5), (5,)),
        ((4, 1), (4, 5)),
        ((4, 1), (1, 5)),
        ((), (4, 5)),
        ((4, 5), ()),
        ((2, 1, 5), (3, 5)),
    ],
    ids=str,
)
def test_broadcasting(
    shapes: tuple[tuple[int, ...], ...], reduction: str, log_target: bool
) -> None:
    x, _ = pair(shapes[0], torch.float64, log_target)
    _, t = pair(shapes[1], torch.float64, log_target)
    compare(x, t, reduction=reduction, log_target=log_target)


@both_targets
@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_promotion(dtypes: tuple[torch.dtype, torch.dtype], log_target: bool) -> None:
    x, _ = pair((3, 5), dtypes[0], log_target)
    _, t = pair((3, 5), dtypes[1], log_target)
    compare(x, t, reduction="batchmean", log_target=log_target, gradients=False)
    ours = torch.autograd.grad(kl_div(x, t, reduction="sum", log_target=log_target), (x, t))
    theirs = torch.autograd.grad(F.kl_div(x, t, reduction="sum", log_target=log_target), (x, t))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [g.dtype for g in ours] == [*dtypes]


def test_zero_dim_does_not_promote() -> None:
    x, _ = pair((3,), torch.float32, False)
    _, t = pair((), torch.float64, False)
    assert compare(x, t, reduction="none").value.dtype == torch.float32  # type: ignore[union-attr]


@both_targets
@all_reductions
@pytest.mark.parametrize("shape", [(0,), (0, 5), (4, 0), (0, 0)], ids=str)
def test_zero_size(shape: tuple[int, ...], reduction: str, log_target: bool) -> None:
    x = torch.empty(shape, requires_grad=True)
    t = torch.empty(shape, requires_grad=True)
    compare(x, t, reduction=reduction, log_target=log_target)


INPUTS = [0.0, -0.0, -1.0, 2.5, -1e30, -math.inf, math.inf, math.nan]
TARGETS = [0.0, -0.0, 0.3, 1.0, 2.0, 1e-3, 1e-40, 1e-45, 88.0, 1e30, -0.5, math.inf, -math.inf]
TARGETS = [*TARGETS, math.nan]


@both_targets
@pytest.mark.parametrize("upstream", [1.0, 0.0, -2.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_special_values(dtype: torch.dtype, upstream: float, log_target: bool) -> None:
    """Every pair alone, as a sum: the value and both gradients, NaN and infinities included."""
    for x_value, t_value in itertools.product(INPUTS, TARGETS):
        x = torch.tensor([x_value], dtype=dtype, requires_grad=True)
        t = torch.tensor([t_value], dtype=dtype, requires_grad=True)
        found = []
        for function in (kl_div, F.kl_div):
            value = function(x, t, reduction="sum", log_target=log_target)
            found.append(
                (value, *torch.autograd.grad(value, (x, t), torch.full((), upstream).to(dtype)))
            )
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(
                ours, theirs, equal_nan=True, rtol=1e-5, atol=0, msg=f"{x_value} {t_value}"
            )
            # -0 and 0 are told apart in a gradient: 1 / gradient is what preconditioners take
            if ours is not found[0][0] and theirs == 0:
                assert torch.equal(ours.signbit(), theirs.signbit()), (x_value, t_value)


@both_targets
def test_special_values_among_others(log_target: bool) -> None:
    """One odd element must not be lost in a long sum, wherever it is."""
    for value, position in itertools.product(
        (math.nan, math.inf), (0, 31, 32, 511, 512, 16384, 20000)
    ):
        x, t = pair((20001,), torch.float32, log_target, grad=False)
        x[position] = -value
        compare(x, t, reduction="sum", log_target=log_target)


def test_nothing_is_normalised_or_clamped() -> None:
    x = torch.tensor([[5.0, -3.0]], requires_grad=True)
    t = torch.tensor([[7.0, 0.1]], requires_grad=True)
    compare(x, t, reduction="batchmean")


@both_targets
def test_same_tensor_twice(log_target: bool) -> None:
    x, _ = pair((3, 5), torch.float64, log_target)
    x = x.detach().exp().requires_grad_()
    compare(x, x, reduction="sum", log_target=log_target)
