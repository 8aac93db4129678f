"""Faults of the fused lm_head and of sparse teachers that a reading found, as inputs."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl import linear_inputs
from fusedkl.backends import BACKENDS
from fusedkl.linear_plan import tiles

WHY_NOT = BACKENDS["cpu"].why_not(torch.device("cpu"))
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
KINDS = ("forward_kl", "reverse_kl", "jeffreys", "jsd")
# Whole rows in a tile, and rows cut in two, of fewer tokens.
TOKENS, VOCABULARY = 520, 1500


def heads() -> list[Tensor]:
    shapes = ((TOKENS, 5), (VOCABULARY, 5)) * 2
    return [torch.randn(shape) for shape in shapes]


def logits(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    hidden, weight, ref_hidden, ref_weight = (t.double() for t in parts)
    return hidden @ weight.t(), ref_hidden @ ref_weight.t()


def off(found: Tensor, exact: Tensor, parts: list[Tensor]) -> float:
    """The largest error of a gradient of two losses that should be one."""
    pairs = zip(torch.autograd.grad(found, parts), torch.autograd.grad(exact, parts), strict=True)
    return max(float(oracle.relative_l2(a.reshape(1, -1), e.reshape(1, -1))) for a, e in pairs)


def test_the_tiles_are_others() -> None:
    counted = int((torch.arange(TOKENS) % 5 != 0).sum())
    assert tiles(TOKENS, VOCABULARY, 4, "cpu").vocabulary >= VOCABULARY
    assert tiles(counted, VOCABULARY, 4, "cpu").vocabulary < VOCABULARY


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_of_fewer_tokens_than_the_forward(kind: str) -> None:
    """Each half of a row took the mean of its own slopes for that of the row."""
    parts = [t.requires_grad_() for t in heads()]
    counted = (torch.arange(TOKENS) % 5 != 0).double()
    found = fusedkl.linear_divergence(*parts, kind, backend="cpu")
    exact = fusedkl.divergence(*logits(parts), kind, backend="reference")
    assert off((found * counted).sum(), (exact * counted).sum(), parts) < 1e-5


def test_statistics_with_a_backward_of_fewer_tokens() -> None:
    parts = [t.requires_grad_() for t in heads()]
    counted = (torch.arange(TOKENS) % 5 != 0).double()
    fields = ("reverse_kl", "entropy")

    def loss(of: Any) -> Tensor:
        return ((of.reverse_kl + of.entropy) * counted).sum()

    found = loss(fusedkl.linear_token_stats(*parts, fields=fields, backend="cpu"))
    exact = loss(fusedkl.token_stats(*logits(parts), fields=fields, backend="reference"))
    assert off(found, exact, parts) < 1e-5


@pytest.mark.parametrize("function", ["linear_divergence", "linear_token_stats"])
def test_a_backend_that_takes_the_dtype_of_the_reference(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        linear_inputs, "resolve", lambda _, __, wanted: asked.append(wanted) or "reference"
    )
    parts = [t.double() if i > 1 else t for i, t in enumerate(heads())]
    getattr(fusedkl, function)(*parts)
    assert "float64" in asked[0]


@pytest.mark.parametrize("reference", ["ref_hidden", "ref_logits", "ref_topk"])
def test_a_weight_is_not_rounded_below_the_result(reference: str) -> None:
    hidden, weight = torch.randn(2, 4), torch.randn(9, 4)
    other = torch.randn(2, 9).double()
    given: dict[str, Any] = {"ref_logits": other}
    if reference == "ref_hidden":
        given = {"ref_hidden": torch.randn(2, 4).double(), "ref_weight": torch.randn(9, 4).double()}
    elif reference == "ref_topk":
        log_q, ids = other.log_softmax(-1).topk(3)
        given = {"ref_topk": [ids, log_q]}
    tiny = torch.tensor([1e-50, 0.0], dtype=torch.float64)  # a float32 has none such
    each = fusedkl.linear_divergence(hidden, weight, **given)
    mean = fusedkl.linear_divergence(hidden, weight, **given, token_weight=tiny, reduction="mean")
    assert each.dtype == mean.dtype == torch.float64
    torch.testing.assert_close(mean, each[0], rtol=1e-6, atol=0)  # a product of one token, not two


@pytest.mark.parametrize("head", [False, True])
def test_a_bad_log_probability_beside_an_infinite_term(head: bool) -> None:
    ids, log_q = torch.tensor([[0, 2]]), torch.tensor([[math.nan, -0.69]])
    policy = torch.tensor([[0.0, 0.0, -math.inf]])
    options: dict[str, Any] = {"tail": "drop", "backend": "cpu"}
    if head:
        bias = policy[0].clone()
        found = fusedkl.linear_divergence(
            torch.zeros(1, 1), torch.zeros(3, 1), bias=bias, ref_topk=(ids, log_q), **options
        )
    else:
        found = fusedkl.topk_divergence(policy, ids, log_q, **options)
    assert bool(found.isnan().all())


@pytest.mark.parametrize("low", [-1800.0, -math.inf])
def test_renyi_of_a_token_that_underflows_in_both_rows(low: float) -> None:
    """q^2 / p of it need not: 0 times infinity was NaN."""
    ones, zeros = torch.ones(1, 1), torch.zeros(2, 1)
    bias = torch.tensor([0.0, low], requires_grad=True)
    options = {"alpha": 2.0, "bias": bias, "ref_bias": torch.tensor([0.0, -1000.0])}
    value = fusedkl.linear_divergence(ones, zeros, ones, zeros, "renyi", **options, backend="cpu")
    assert value.tolist() == [0.0 if math.isfinite(low) else math.inf]
    (slope,) = torch.autograd.grad(value.sum(), bias)
    assert bool((slope.abs() < 1e-12).all())


@pytest.mark.parametrize("bad", ["hidden", "ref_hidden"])
@pytest.mark.parametrize(
    "field", ["logprob", "ref_logprob", "entropy", "ref_entropy", "reverse_kl"]
)
def test_a_bad_side_under_create_graph(bad: str, field: str) -> None:
    """Of what does not read it, gradients are those without create_graph."""
    parts = [torch.randn(shape) for shape in ((3, 4), (9, 4), (3, 4), (9, 4))]
    parts[0 if bad == "hidden" else 2][0] = math.nan
    leaves = [t.requires_grad_() for t in parts]
    del leaves[1 if bad == "hidden" else 3]  # 0 times its side's NaN
    ids = torch.tensor([[1, 2]]).expand(3, 2)
    fields = ("logprob", "ref_logprob") if "logprob" in field else (field,)
    stats = fusedkl.linear_token_stats(*parts, ids, fields=fields, backend="cpu")
    loss = getattr(stats, field).sum()
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    plain = torch.autograd.grad(loss, leaves, **options)
    again = torch.autograd.grad(loss, leaves, create_graph=True, **options)
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a.detach(), b, equal_nan=True)


def test_bad_logits_of_the_reference_leave_the_weight_alone() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True)
    given = torch.randn(3, 9)
    given[0] = math.nan
    options = {"ref_logits": given.requires_grad_(), "fields": ("entropy", "ref_entropy")}
    stats = fusedkl.linear_token_stats(hidden, weight, **options, backend="cpu")
    (slope,) = torch.autograd.grad(stats.ref_entropy.sum(), weight, create_graph=True)
    assert torch.equal(slope, torch.zeros_like(weight))
