"""States of slices of a vocabulary, merged, are the state of the whole; gradients by slices."""

from __future__ import annotations

import math

import cases
import oracle
import pytest
import torch
from torch import Tensor

from fusedkl import reference
from fusedkl.layout import inverse_temperature

OPS = torch.ops.fusedkl
FIELDS = ["forward_kl", "reverse_kl", "entropy", "logsumexp"]
# A slice of one token, one of nearly all, and more slices than one: V is 67.
CUTS = {"three": (20, 21), "one token": (1,), "many": tuple(range(9, 67, 7))}


def stats(x: Tensor, y: Tensor, inverse: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = OPS.row_stats(
        x, y, None, FIELDS, None, inverse, None, None, None, backend
    )
    return out


def slices(t: Tensor, cuts: tuple[int, ...]) -> list[Tensor]:
    return [t[:, a:b] for a, b in zip((0, *cuts), (*cuts, t.shape[1]), strict=True)]


def merged(
    x: Tensor, y: Tensor, cuts: tuple[int, ...], inverse: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    pairs = zip(slices(x, cuts), slices(y, cuts), strict=True)
    parts = torch.stack([stats(a, b, inverse, backend)[1] for a, b in pairs])
    out: tuple[Tensor, Tensor] = OPS.merge_states(parts, FIELDS, inverse, backend)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("temperature", ["T=1", "T per row"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("scenario", cases.SCENARIOS)
def test_merged_values_are_those_of_the_whole_row(
    backend: str, scenario: str, cuts: tuple[int, ...], temperature: str
) -> None:
    x, y = cases.make(scenario, torch.float32)
    inverse = inverse_temperature(cases.TEMPERATURES[temperature], x)
    values, state = merged(x, y, cuts, inverse, backend)
    truth = cases.truth(scenario, torch.float32, temperature)
    for name, value in zip(FIELDS, values, strict=True):
        # below 1e-12 a KL is promised to an absolute 1e-17
        assert oracle.relative_error(value, truth[name], 1e-12) < 1e-5, name
    assert values.dtype == state.dtype == torch.float64
    assert bool((values[:2] >= 0).all())


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("scenario", ["flat 1e-3", "flat 8", "peaked 2", "offset 1", "policy hole"])
def test_gradients_of_slices_are_the_whole_row_s(scenario: str, kind: str) -> None:
    x, y = cases.make(scenario, torch.float32)
    cuts = CUTS["three"]
    _, state = merged(x, y, cuts, None, "cpu")
    grad = torch.zeros(len(FIELDS), x.shape[0])
    grad[FIELDS.index(kind)] = 1
    pairs = zip(slices(x, cuts), slices(y, cuts), strict=True)
    found = [
        OPS.row_stats_backward(
            grad, a, b, None, state, FIELDS, None, None, None, None, True, True, "cpu"
        )
        for a, b in pairs
    ]
    truth = cases.truth(scenario, torch.float32, "T=1")
    for i, suffix in enumerate(("", "_reference")):
        gradient = torch.cat([pair[i] for pair in found], -1)
        assert oracle.relative_l2(gradient, truth[f"d_{kind}{suffix}"], 1e-12) < 1e-5


def test_a_slice_s_mean_is_not_taken_for_the_row_s() -> None:
    """A large divergence: the kernel measures the mean again, which it may on whole rows only."""
    x, y = 3 * torch.randn(2, 4, 300)
    _, state = merged(x, y, (150,), None, "cpu")
    whole = stats(x, y, None, "cpu")[1]
    assert bool((whole[:, reference.STATE.index("whole")] == 1).all())
    assert bool((state[:, reference.STATE.index("whole")] == 0).all())
    grad = torch.zeros(len(FIELDS), 4)
    grad[FIELDS.index("reverse_kl")] = 1
    halves = [
        OPS.row_stats_backward(
            grad, a, b, None, state, FIELDS, None, None, None, None, True, False, "cpu"
        )[0]
        for a, b in zip(slices(x, (150,)), slices(y, (150,)), strict=True)
    ]
    truth = oracle.fields(x, y)["d_reverse_kl"]
    assert oracle.relative_l2(torch.cat(halves, -1), truth) < 1e-5


def test_slices_without_mass(backend: str) -> None:
    x, y = torch.randn(2, 4, 12)
    x[0, 4:8] = y[0, 4:8] = -math.inf  # in both: skipped
    x[1, 4:8] = -math.inf  # the policy lacks what the reference has
    y[2, 4:8] = -math.inf  # and the other way round
    x[3] = -math.inf  # no distribution
    values, state = merged(x, y, (4, 8), None, backend)
    truth = oracle.fields(x, y)
    for name, value in zip(FIELDS, values, strict=True):
        assert oracle.relative_error(value[:3], truth[name][:3]) < 1e-5, name
        assert bool(value[3].isnan()), name
    assert values[0, 1] == math.inf and values[1, 2] == math.inf
    if backend == "cpu":  # the state alone says so to a backward, too
        grad = torch.ones(len(FIELDS), 4)
        gradient = OPS.row_stats_backward(
            grad,
            x[:, 8:],
            y[:, 8:],
            None,
            state,
            FIELDS,
            None,
            None,
            None,
            None,
            True,
            False,
            "cpu",
        )[0]
        assert bool(gradient[3].isnan().all()) and bool(gradient[:3].isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_slice_makes_its_row_nan_and_no_other(backend: str, bad: float) -> None:
    x, y = torch.randn(2, 3, 9)
    x[1, 4] = bad
    values, _ = merged(x, y, (3, 6), None, backend)
    assert bool(values[:, 1].isnan().all()) and bool(values[:, ::2].isfinite().all())


def test_one_slice_is_itself(backend: str) -> None:
    x, y = torch.randn(2, 3, 9)
    values, state = stats(x, y, None, backend)
    again, same = OPS.merge_states(state[None], FIELDS, None, backend)
    assert torch.equal(same, state)
    torch.testing.assert_close(again, values.double(), rtol=1e-6, atol=0)


def test_equal_rows_are_exactly_zero_apart(backend: str) -> None:
    x = torch.randint(-4000, 4000, (3, 50)) / 1024  # the sum below is exact
    values, _ = merged(x, x + 0.5, (10, 30), None, backend)
    assert bool((values[:2] == 0).all())


def test_bad_input(backend: str) -> None:
    state = stats(*torch.randn(2, 3, 9), None, backend)[1]
    for parts, fields, said in (
        (state, FIELDS, r"parts must be float64 of shape \[P, N, 16\].*\[3, 16\]"),
        (state[None].float(), FIELDS, "parts must be float64.*got float32"),
        (state[None][:0], FIELDS, "P >= 1"),
        (state[None], ["logprob"], "fields must be of .*got 'logprob'"),
    ):
        with pytest.raises(ValueError, match=said):
            OPS.merge_states(parts, fields, None, backend)
    with pytest.raises(ValueError, match="inv_temperature must have shape"):
        OPS.merge_states(state[None], FIELDS, torch.ones(2, dtype=torch.float64), backend)
