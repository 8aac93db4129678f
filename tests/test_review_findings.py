"""Faults that an adversarial reading once found, each as the input that showed it."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

import fusedkl

LOWEST = torch.finfo(torch.float32).min


def gradients(kind: str, policy: Tensor, reference: Tensor, **options: object) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (policy, reference)]
    fusedkl.divergence(*leaves, kind, **options).sum().backward()
    return [t.grad for t in leaves if t.grad is not None]


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jeffreys"])
def test_mixed_dtypes_beyond_one_chunk(backend: str, kind: str) -> None:
    torch.manual_seed(0)
    policy, reference = (torch.randn(2, 6000) * 4).bfloat16(), torch.randn(2, 6000) * 4
    found = gradients(kind, policy, reference, backend=backend)
    true = gradients(kind, policy.double(), reference.double(), backend="reference")
    assert oracle.relative_l2(found[0], true[0]) < 4e-3
    assert oracle.relative_l2(found[1], true[1]) < 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_long_row_without_mass(backend: str, kind: str) -> None:
    nothing, something = torch.full((1, 70000), -math.inf), torch.randn(1, 70000)
    for pair in ((nothing, something), (something, nothing), (nothing, nothing)):
        assert fusedkl.divergence(*pair, kind, backend=backend).isnan().all()
    assert fusedkl.entropy(nothing, backend=backend).isnan().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("masked", ["policy", "reference", "both"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_masks_at_the_lowest_float(
    backend: str, kind: str, masked: str, temperature: float
) -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 2, 20)
    for name, t in (("policy", policy), ("reference", reference)):
        if masked in (name, "both"):
            t[:, ::3] = LOWEST
    leaves = [t.clone().requires_grad_() for t in (policy, reference)]
    value = fusedkl.divergence(*leaves, kind, temperature=temperature, backend=backend)
    (3 * value).sum().backward()
    true = fusedkl.divergence(
        policy.double(), reference.double(), kind, temperature=temperature, backend="reference"
    )
    # Some are beyond float32's largest number, and then infinite in it.
    torch.testing.assert_close(value.detach(), true.float(), rtol=1e-5, atol=0)
    assert not any(bool(t.grad.isnan().any()) for t in leaves if t.grad is not None)


def test_entropy_gradient_at_the_lowest_float(backend: str) -> None:
    logits = torch.randn(1, 20)
    logits[:, ::3] = LOWEST
    logits.requires_grad_()
    fusedkl.entropy(logits, temperature=0.5, backend=backend).sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("bad", [-1.0, 0.0, math.inf, math.nan])
def test_temperatures_of_a_scalar_loss_are_checked(backend: str, bad: float) -> None:
    policy = torch.randn(2, 9, requires_grad=True)
    with pytest.raises(ValueError, match="temperature"):
        fusedkl.forward_kl(
            policy,
            torch.randn(2, 9),
            temperature=torch.tensor([1.0, bad]),
            reduction="mean",
            backend=backend,
        )


def test_equal_rows_at_the_lowest_float(backend: str) -> None:
    logits = torch.full((1, 20), LOWEST)
    assert fusedkl.forward_kl(logits, logits.clone(), backend=backend) == 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_masked_row_of_no_temperature(backend: str, reduction: str) -> None:
    policy = torch.randn(2, 9, requires_grad=True)
    options = {"temperature": torch.tensor([1.0, 0.0]), "mask": torch.tensor([True, False])}
    value = fusedkl.forward_kl(
        policy, torch.randn(2, 9), reduction=reduction, backend=backend, **options
    )
    value.sum().backward()
    assert policy.grad is not None
    assert bool((policy.grad[1] == 0).all()) and bool(policy.grad[0].isfinite().all())


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
def test_a_masked_row_under_an_infinite_gradient(backend: str, upstream: float) -> None:
    policy = torch.randn(2, 9, requires_grad=True)
    value = fusedkl.forward_kl(
        policy,
        torch.randn(2, 9),
        mask=torch.tensor([True, False]),
        reduction="mean",
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(value, policy, torch.tensor(upstream))
    assert bool((gradient[1] == 0).all())


@pytest.mark.parametrize("temperature", [1e-10, 1e-6, 1e-4, 1e4, 1e10])
def test_extreme_temperatures(backend: str, temperature: float) -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 3, 40)
    for kind in ("forward_kl", "reverse_kl"):
        found = fusedkl.divergence(
            policy, reference, kind, temperature=temperature, backend=backend
        )
        true = fusedkl.divergence(
            policy.double(), reference.double(), kind, temperature=temperature, backend="reference"
        )
        assert oracle.relative_error(found, true) < 1e-5
        for gradient in gradients(
            kind, policy, reference, temperature=temperature, backend=backend
        ):
            assert bool(gradient.isfinite().all())


def test_a_far_policy_logit_on_the_top_token(backend: str) -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 1, 20)
    reference[:, 0] = 5.0
    policy[:, ::3] = -1e20
    kept = torch.ones(20, dtype=torch.bool)
    kept[::3] = False
    p = torch.softmax(policy[:, kept].double(), -1)
    log_q = torch.log_softmax(reference.double(), -1)[:, kept]
    true = (p * (p.log() - log_q)).sum(-1)
    found = fusedkl.reverse_kl(policy, reference, backend=backend)
    assert oracle.relative_error(found, true) < 1e-5


@pytest.mark.parametrize("top", [-math.inf, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_token_of_no_weight_that_the_policy_lacks(backend: str, kind: str, top: float) -> None:
    """It makes forward_kl infinite or huge, and does not hide how little the others differ."""
    policy = torch.full((1, 4096), 70.0).bfloat16()
    policy[0, 0] = top
    reference = (1.2e-5 * torch.arange(4096) / 4096).bfloat16()[None].contiguous()
    reference[0, 0] = -60
    found = gradients(kind, policy, reference, backend=backend)[0]
    if kind == "jsd":
        value = fusedkl.jsd(policy, reference, backend=backend)
        true = fusedkl.jsd(policy.double(), reference.double(), backend="reference")
        assert oracle.relative_error(value, true) < 1e-5
    expected = gradients(kind, policy.double(), reference.double(), backend="reference")[0]
    assert oracle.relative_l2(found, expected) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [12.0, 16.0, 23.0, 30.0, 36.0, 90.0])
def test_log_probabilities_beside_a_divergence(
    backend: str, dtype: torch.dtype, height: float
) -> None:
    """Of the top token, far above the tokens that a sample of the row has."""
    # 12 above equal tokens: what docs/numerics.md says of a tail that is all alike
    limit = 4e-6 if height == 12.0 else 1e-6
    policy = torch.zeros(2, 32768, dtype=dtype)
    policy[:, 20000] = height
    policy[1, 30000] = 0.5
    reference = policy.flip(0).contiguous()
    ids = torch.tensor([20000, 20000])
    fields = ["logprob", "ref_logprob", "forward_kl"]
    found = fusedkl.token_stats(policy, reference, ids, fields=fields, backend=backend)
    for logits, logprob in ((policy, found.logprob), (reference, found.ref_logprob)):
        true = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, None])[:, 0]
        assert float((logprob.double() - true).abs().max()) < limit


def test_in_place_where_the_policy_has_no_gradient() -> None:
    """Terms that cancel: the policy becomes 0, after the reference's gradient was made of it."""
    policy, reference = torch.randn(2, 1, 40)
    reference[0, 3] = -math.inf
    fields = ["forward_kl", "reverse_kl"]
    _, state = torch.ops.fusedkl.row_stats(
        policy, reference, None, fields, None, None, None, None, None, "cpu"
    )
    row = (torch.tensor([[1.0], [-1.0]]), policy, reference, None, state, fields, None, None)
    _, expected = torch.ops.fusedkl.row_stats_backward(*row, None, None, True, True, "cpu")
    found = torch.ops.fusedkl.row_stats_backward_(*row, None, None, True, "cpu")
    assert torch.equal(found, expected) and bool((found != 0).any())
    assert bool((policy == 0).all())


def test_backward_of_arguments_that_no_forward_had() -> None:
    policy = torch.randn(2, 9)
    ids = torch.tensor([[3], [9]])
    row = (policy, None, ids % 9, ["logprob"], None, None, None, None, None)
    _, state = torch.ops.fusedkl.row_stats(*row, "cpu")

    def backward(grad: Tensor, ids: Tensor, state: Tensor) -> Tensor:
        row = (grad, policy, None, ids, state, ["logprob"], None, None, None, None)
        gradient: Tensor = torch.ops.fusedkl.row_stats_backward(*row, True, False, "cpu")[0]
        return gradient

    with pytest.raises(RuntimeError, match="token_ids must be from -1 to 8; got 9"):
        backward(torch.ones(1, 2), ids, state)
    backward(torch.tensor([[1.0, 0.0]]), ids, state)  # of a masked row it may be anything
    with pytest.raises(RuntimeError, match="state does not fit"):
        backward(torch.ones(1, 2), ids % 9, state.float())
