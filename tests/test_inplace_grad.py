"""inplace_grad: the same gradient in the logits' own memory, and every misuse of it refused."""

from __future__ import annotations

import cases
import pytest
import torch
from torch import Tensor

import fusedkl


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_inplace_gradient_is_the_gradient(backend: str, kind: str, dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 4, 101).to(dtype)
    reference = torch.randn(3, 4, 101).to(dtype).requires_grad_()
    mask = torch.rand(3, 4) < 0.7
    found = []
    for inplace in (False, True):
        leaf = hidden.clone().requires_grad_()
        reference.grad = None
        logits = leaf * 2
        memory = logits.data_ptr()
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        value = fusedkl.divergence(
            logits,
            reference,
            kind,
            mask=mask,
            reduction="mean",
            inplace_grad=inplace,
            backend=backend,
        )
        assert torch.equal(logits, leaf * 2)  # forward leaves it alone
        value.backward()
        assert (seen[0].data_ptr() == memory) is inplace
        assert torch.equal(logits.detach(), seen[0]) is inplace
        found.append((value.detach(), leaf.grad, reference.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_inplace_gradient_of_a_strided_policy(backend: str) -> None:
    logits, reference = torch.randn(3, 6, 40), torch.randn(3, 5, 40)
    expected = logits[:, :-1].clone().requires_grad_()
    fusedkl.forward_kl(expected, reference, backend=backend).sum().backward()
    base = logits.clone()
    view = base[:, :-1].requires_grad_()
    fusedkl.forward_kl(view, reference, inplace_grad=True, backend=backend).sum().backward()
    assert torch.equal(base[:, :-1], expected.grad) and torch.equal(view.grad, expected.grad)
    assert torch.equal(base[:, -1], logits[:, -1])


def test_inplace_gradient_allows_one_backward(backend: str) -> None:
    policy, reference = torch.randn(2, 4, 30)
    leaf = policy.clone().requires_grad_()
    loss = fusedkl.forward_kl(
        leaf * 1, reference, reduction="sum", inplace_grad=True, backend=backend
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_grad=True allows one backward"):
        loss.backward()
    logits = policy.clone().requires_grad_() * 1
    loss = fusedkl.forward_kl(
        logits, reference, reduction="sum", inplace_grad=True, backend=backend
    )
    with pytest.raises(RuntimeError, match="inplace_grad=True has no double backward"):
        torch.autograd.grad(loss, logits, create_graph=True)
    assert torch.equal(logits, policy)  # refused before anything was overwritten


def test_inplace_gradient_is_seen_by_others_who_saved_the_logits(backend: str) -> None:
    """The version counter moves: autograd refuses stale logits instead of using the gradient."""
    policy, reference = torch.randn(2, 4, 30)
    logits = policy.clone().requires_grad_() * 1
    other = logits.exp().sum() + (logits**2).sum()
    loss = fusedkl.forward_kl(
        logits, reference, reduction="sum", inplace_grad=True, backend=backend
    )
    before = logits._version
    torch.autograd.grad(loss, logits)
    assert logits._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_gradient_of_logits_changed_meanwhile(backend: str) -> None:
    for inplace in (False, True):
        logits = torch.randn(4, 30).requires_grad_() * 1
        loss = fusedkl.forward_kl(
            logits, torch.randn(4, 30), reduction="sum", inplace_grad=inplace, backend=backend
        )
        with torch.no_grad():
            logits.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inplace_gradient_without_a_gradient(backend: str) -> None:
    """No effect under no_grad, for detached logits, or when only the reference is trained."""
    policy, reference = torch.randn(2, 4, 30)
    before = policy.clone()
    trained = policy.clone().requires_grad_()
    with torch.no_grad():
        fusedkl.forward_kl(trained, reference, inplace_grad=True, backend=backend)
    assert torch.equal(trained, before)
    fusedkl.forward_kl(policy, reference, inplace_grad=True, backend=backend)
    leaf = reference.clone().requires_grad_()
    fusedkl.forward_kl(policy, leaf, inplace_grad=True, backend=backend).sum().backward()
    assert torch.equal(policy, before) and policy._version == 0
    plain = reference.clone().requires_grad_()
    fusedkl.forward_kl(policy, plain, backend=backend).sum().backward()
    assert torch.equal(leaf.grad, plain.grad)


def test_policy_and_reference_may_share_a_storage_but_not_memory(backend: str) -> None:
    both = torch.randn(8, 30)
    expected = both[:4].clone().requires_grad_()
    fusedkl.forward_kl(expected, both[4:].clone(), backend=backend).sum().backward()
    kept = both[4:].clone()
    policy = both[:4].detach().requires_grad_()
    fusedkl.forward_kl(policy, both[4:], inplace_grad=True, backend=backend).sum().backward()
    assert torch.equal(both[:4], expected.grad) and torch.equal(both[4:], kept)
