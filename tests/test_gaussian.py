"""KL of Gaussians: the formula in 60 digits, torch.distributions, extremes, gradients, errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import oracle
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.profiler import ProfilerActivity, profile

import fusedkl

# mu, logvar, prior_mu, prior_logvar: everyday, nearly equal, and far out at both ends
POINTS = [
    (0.3, -1.2, 0.0, 0.0),
    (-2.0, 0.7, 1.5, -0.4),
    (1.0, 1e-4, 1.0, 0.0),
    (1.0, 2.0, 1.0 + 1e-6, 2.0 + 1e-6),
    (0.0, 80.0, 0.0, 0.0),
    (0.0, -1e4, 0.0, 0.0),
    (1.0, -80.0, 0.0, -80.0),
    (3.0, 160.0, 2.0, 90.0),
    (1e-30, -150.0, 0.0, -150.0),
    (0.0, -300.0, 0.0, -300.0),
    (1e-30, -200.0, 0.0, -200.0),
    (5.0, 1e4, 4.0, 1e4),
]


def exactly(point: tuple[float, ...]) -> tuple[float, list[float]]:
    """Value and the four partial derivatives."""
    with mpmath.workdps(60):
        m, v, pm, pv = (mpmath.mpf(x) for x in point)
        ratio, pull = mpmath.exp(v - pv), (m - pm) * mpmath.exp(-pv)
        square = (m - pm) * pull
        value = (ratio - 1 - (v - pv) + square) / 2
        slopes = [pull, (ratio - 1) / 2, -pull, (1 - ratio - square) / 2]
        return float(value), [float(s) for s in slopes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    columns = torch.tensor(POINTS, dtype=dtype).t().contiguous()
    given = [c.clone().requires_grad_() for c in columns]
    value = fusedkl.gaussian_kl(*given)
    value.sum().backward()
    truth = [exactly(tuple(row)) for row in columns.t().tolist()]
    bound = 1e-12 if dtype == torch.float64 else 2e-5  # exp of 100 costs 100 roundings
    wanted = torch.tensor([v for v, _ in truth], dtype=torch.float64)
    assert oracle.relative_error(value, wanted.to(dtype)) <= bound
    assert bool((value >= 0).all())
    for i, t in enumerate(given):
        assert t.grad is not None
        slope = torch.tensor([s[i] for _, s in truth], dtype=torch.float64).to(dtype)
        assert oracle.relative_error(t.grad, slope, floor=1e-37) <= bound, i


def test_it_is_what_torch_distributions_computes() -> None:
    m, v, pm, pv = torch.randn(4, 50, 3, dtype=torch.float64)
    expected = kl_divergence(Normal(m, (v / 2).exp()), Normal(pm, (pv / 2).exp()))
    torch.testing.assert_close(fusedkl.gaussian_kl(m, v, pm, pv), expected)
    standard = kl_divergence(Normal(m, (v / 2).exp()), Normal(torch.zeros(3), torch.ones(3)))
    torch.testing.assert_close(fusedkl.gaussian_kl(m, v), standard)
    assert fusedkl.gaussian_kl(m.float(), v.half()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_number_is_not_rounded_to_the_type_of_a_tensor(dtype: torch.dtype) -> None:
    mu, logvar = torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=torch.float64)
    found = fusedkl.gaussian_kl(mu, logvar, prior_mu=0.1)
    torch.testing.assert_close(
        found, torch.full((3,), 0.005, dtype=torch.float64), rtol=1e-14, atol=0
    )
    narrow = fusedkl.gaussian_kl(mu, logvar.to(dtype), prior_mu=0.1)
    torch.testing.assert_close(narrow, torch.full((3,), 0.005), rtol=1e-6, atol=0)


def test_nothing_is_made_of_numbers_on_the_host() -> None:
    # where its copy to a GPU would wait, and a CUDA graph could not capture it
    mu = torch.zeros(3)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        fusedkl.gaussian_kl(mu, mu, 0.5)
    names = {event.name for event in run.events()}
    assert "aten::exp" in names and "aten::lift_fresh" not in names


def test_equal_gaussians_are_exactly_0_apart() -> None:
    m, v = 100 * torch.randn(2, 1000)
    assert not fusedkl.gaussian_kl(m, v, m.clone(), v.clone()).any()


def test_an_infinite_value_or_nan_stays_in_its_element() -> None:
    m = torch.tensor([0.0, math.nan, 1.0, 0.0])
    v = torch.tensor([math.inf, 0.0, 0.0, -math.inf])
    found = fusedkl.gaussian_kl(m, v)
    assert found[0] == math.inf and found[3] == math.inf
    assert found[1].isnan() and found[2] == 0.5


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("none", lambda t: t),
        ("sum", torch.sum),
        ("mean", torch.mean),
        ("batchmean", lambda t: t.sum() / t.shape[0]),
    ],
)
def test_reductions(reduction: str, expected: Callable[[Tensor], Tensor]) -> None:
    m, v = torch.randn(2, 4, 5, dtype=torch.float64)
    prior = torch.randn(5, dtype=torch.float64)
    each = fusedkl.gaussian_kl(m, v, prior)
    found = fusedkl.gaussian_kl(m, v, prior, reduction=reduction)
    torch.testing.assert_close(found, expected(each))
    m.requires_grad_()
    fusedkl.gaussian_kl(m, v, prior, reduction=reduction).sum().backward()


def test_it_differentiates_twice() -> None:
    given = [t.requires_grad_() for t in torch.randn(4, 3, dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(fusedkl.gaussian_kl, given)


Z, ONE = torch.zeros(2, 3), torch.zeros(())
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "list": (lambda: fusedkl.gaussian_kl([0.0], Z), TypeError, "mu must be a tensor, got list"),  # type: ignore[arg-type]
    "ints": (lambda: fusedkl.gaussian_kl(Z, Z.int()), TypeError, "logvar .* got int32"),
    "prior": (lambda: fusedkl.gaussian_kl(Z, Z, "0"), TypeError, "prior_mu .* got str"),  # type: ignore[arg-type]
    "bool": (lambda: fusedkl.gaussian_kl(Z, Z, 0, True), TypeError, "prior_logvar .* got bool"),
    "shapes": (lambda: fusedkl.gaussian_kl(Z, Z[:, :2]), ValueError, r"got \[2, 3\], \[2, 2\]"),
    "device": (lambda: fusedkl.gaussian_kl(Z, Z.to("meta")), ValueError, "logvar .* got meta"),
    "reduction": (lambda: fusedkl.gaussian_kl(Z, Z, reduction="a"), ValueError, "reduction .* 'a'"),
    "0-d": (lambda: fusedkl.gaussian_kl(ONE, ONE, reduction="batchmean"), ValueError, "batch dim"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    function, error, text = BAD[case]
    with pytest.raises(error, match=text):
        function()
