"""Masks, labels, weights and reductions, against their definition on the per-token numbers."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from torch import Tensor

import fusedkl
from fusedkl.autograd import ordered_sum

SHAPE = (3, 5, 21)
# The widest that the backends of this run take, and what two ways to the same number may differ by.
DOUBLE = torch.float64 in cases.DTYPES
WIDEST = torch.float64 if DOUBLE else torch.float32
EQUAL = {"rtol": 1e-12 if DOUBLE else 2e-6, "atol": 0.0}
SLOPES = {"rtol": 1e-9, "atol": 1e-15} if DOUBLE else {"rtol": 1e-5, "atol": 1e-8}


def inputs() -> tuple[Tensor, Tensor]:
    policy, reference = torch.randn(2, *SHAPE, dtype=WIDEST)
    return policy.requires_grad_(), reference.requires_grad_()


def defined(tokens: Tensor, counted: Tensor, weight: Tensor, reduction: str) -> Tensor:
    """The documentation, word for word."""
    weighted = torch.where(counted, weight * tokens, 0)
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    if reduction == "mean":
        return weighted.sum() / torch.where(counted, weight, 0).sum()
    return weighted.sum() / tokens.shape[0]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", ["no", "mask", "labels", "mask and labels"])
@pytest.mark.parametrize("kind", ["forward_kl", "jeffreys"])
def test_definition(backend: str, kind: str, masked: str, weighted: bool, reduction: str) -> None:
    policy, reference = inputs()
    mask = torch.rand(SHAPE[:2]) < 0.6
    labels = torch.where(torch.rand(SHAPE[:2]) < 0.6, 3, 0)
    weight = torch.rand(SHAPE[:2], dtype=WIDEST) + 0.1
    weight[0, 0] = -0.5  # an advantage may be negative
    counted = torch.ones(SHAPE[:2], dtype=torch.bool)
    options: dict[str, object] = {}
    if "mask" in masked:
        options["mask"], counted = mask, counted & mask
    if "labels" in masked:
        options |= {"labels": labels, "ignore_index": 0}
        counted = counted & (labels != 0)
    if weighted:
        options["weight"] = weight
    else:
        weight = torch.ones_like(weight)
    found = fusedkl.divergence(
        policy, reference, kind, reduction=reduction, backend=backend, **options
    )
    tokens = fusedkl.divergence(policy, reference, kind, backend=backend)
    expected = defined(tokens, counted, weight, reduction)
    torch.testing.assert_close(found, expected, **EQUAL)
    upstream = torch.rand_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, (policy, reference), upstream),
        torch.autograd.grad(expected, (policy, reference), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **SLOPES)


@pytest.mark.parametrize(
    ("dtype", "label", "ignored"),
    [(torch.uint8, 156, -100), (torch.int8, 44, 300), (torch.int16, -100, -100)],
)
def test_labels_of_a_narrow_type(dtype: torch.dtype, label: int, ignored: int) -> None:
    """156 is -100 in eight bits, but not the token that is ignored."""
    labels = torch.full(SHAPE[:2], label, dtype=dtype)
    value = fusedkl.forward_kl(*inputs(), labels=labels, ignore_index=ignored)
    assert bool((value == 0).all()) == (label == ignored)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_nothing_counts(backend: str, reduction: str) -> None:
    """0 with a connected graph, not 0/0: a batch of padding must not kill a training step."""
    policy, reference = inputs()
    nothing = torch.zeros(SHAPE[:2], dtype=torch.bool)
    for options in (
        {"mask": nothing},
        {"labels": torch.full(SHAPE[:2], -100)},
        {"weight": nothing.double()},
        {"weight": nothing.double().requires_grad_()},
        {"mask": nothing, "weight": torch.rand(SHAPE[:2])},
    ):
        value = fusedkl.forward_kl(
            policy, reference, reduction=reduction, backend=backend, **options
        )
        assert value == 0 and value.requires_grad
        for gradient in torch.autograd.grad(value, (policy, reference)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_weights_that_cancel_are_not_nothing(backend: str) -> None:
    policy, reference = inputs()
    weight = torch.zeros(SHAPE[:2])
    weight[0, 0], weight[0, 1] = 1, -1
    value = fusedkl.forward_kl(policy, reference, weight=weight, reduction="mean", backend=backend)
    assert not bool(value.isfinite())


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_gradient_to_the_weight(backend: str, reduction: str) -> None:
    policy, reference = inputs()
    mask = torch.rand(SHAPE[:2]) < 0.7
    weight = torch.rand(SHAPE[:2], dtype=WIDEST)
    weight[1] = 0  # its derivative is the row's divergence all the same
    weight.requires_grad_()
    found = fusedkl.forward_kl(
        policy, reference, mask=mask, weight=weight, reduction=reduction, backend=backend
    )
    tokens = fusedkl.forward_kl(policy, reference, backend=backend)
    expected = defined(tokens, mask, weight, reduction)
    arguments = (weight, policy)
    for a, b in zip(
        torch.autograd.grad(found.sum(), arguments),
        torch.autograd.grad(expected.sum(), arguments),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **SLOPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_of_any_float_dtype(backend: str, dtype: torch.dtype) -> None:
    policy, reference = torch.randn(2, 4, 30)
    weight = torch.tensor([0.5, 2.0, 0.25, 1.0]).to(dtype).requires_grad_()
    value = fusedkl.forward_kl(policy, reference, weight=weight, reduction="sum", backend=backend)
    tokens = fusedkl.forward_kl(policy, reference, backend=backend)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, (tokens * weight.float()).sum(), rtol=1e-6, atol=0)
    value.backward()
    assert weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad, tokens.to(dtype))


def test_mean_is_per_token_not_per_element(backend: str) -> None:
    """The trap of F.kl_div, whose mean is V times smaller."""
    policy, reference = torch.randn(2, 6, 40, dtype=WIDEST)
    ours = fusedkl.forward_kl(policy, reference, reduction="mean", backend=backend)
    log_p, log_q = policy.double().log_softmax(-1), reference.double().log_softmax(-1)
    per_row = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(ours, per_row.mean().to(WIDEST), **EQUAL)


def test_strided_and_expanded_masks(backend: str) -> None:
    policy, reference = torch.randn(2, 4, 6, 17)
    column = torch.rand(4, 1) < 0.5
    grid = torch.rand(6, 4) < 0.5
    for mask in (column.expand(4, 6), grid.t(), torch.rand(4, 12)[:, ::2] < 0.5):
        found = fusedkl.forward_kl(policy, reference, mask=mask, backend=backend)
        plain = fusedkl.forward_kl(policy, reference, backend=backend)
        assert torch.equal(found, torch.where(mask, plain, 0))
        weights = fusedkl.forward_kl(policy, reference, weight=mask.float(), backend=backend)
        assert torch.equal(found, weights)


def test_temperature_of_a_masked_row_is_not_looked_at(backend: str) -> None:
    policy, reference = torch.randn(2, 3, 17)
    temperature = torch.tensor([1.0, 0.0, 2.0])
    mask = torch.tensor([True, False, True])
    found = fusedkl.forward_kl(
        policy, reference, temperature=temperature, mask=mask, reduction="sum", backend=backend
    )
    expected = fusedkl.forward_kl(policy[::2], reference[::2], temperature=temperature[::2])
    torch.testing.assert_close(found, expected.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_the_same_bits_for_any_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    values = torch.randn(300_001, dtype=dtype) * torch.logspace(-8, 8, 300_001, dtype=dtype)
    weight = torch.rand(300_001, dtype=dtype)
    found = set()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for _ in range(2):
            total = ordered_sum(values, weight, backend=backend)
            plain = ordered_sum(values, None, backend=backend)
            found.add((total.item(), plain.item()))
    assert len(found) == 1
    exact = math.fsum((values.double() * weight.double()).tolist())
    scale = float((values.double() * weight.double()).abs().sum())
    assert abs(found.pop()[0] - exact) <= 4 * torch.finfo(dtype).eps * scale


def test_a_weighted_sum_is_the_number(backend: str) -> None:
    """Rounded once: the products and their sum are made in float64."""
    for count in (1, 2048, 5003):
        values = torch.randn(count) * torch.logspace(-8, 8, count)
        weight = torch.rand(count)
        for given in (weight, None):
            terms = values.double() if given is None else values.double() * given.double()
            exact, scale = math.fsum(terms.tolist()), float(terms.abs().sum())
            found = ordered_sum(values, given, backend=backend)
            assert found.dtype == torch.float32
            assert abs(found.item() - exact) <= 2**-24 * abs(exact) + 1e-15 * scale


def test_sum_of_a_strided_view(backend: str) -> None:
    values = torch.randn(40, dtype=torch.float64)[::3]
    weight = torch.rand(1, dtype=torch.float64).expand(14)
    found = ordered_sum(values, weight, backend=backend)
    torch.testing.assert_close(found, (values * weight).sum())
