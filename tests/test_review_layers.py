"""Faults of the Python layers that an adversarial reading once found."""

from __future__ import annotations

import gc
import os
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fusedkl
from fusedkl import ops
from fusedkl.integrations import trl_functions

MASK = torch.tensor([True, True, False])


@pytest.mark.parametrize("weight", [[1.0, -1.0, 5.0], [float("nan"), 1.0, 1.0]])
def test_a_masked_row_under_a_divisor_that_is_no_number(backend: str, weight: list[float]) -> None:
    policy = torch.randn(3, 7, requires_grad=True)
    fusedkl.forward_kl(
        policy,
        torch.randn(3, 7),
        weight=torch.tensor(weight),
        mask=MASK,
        reduction="mean",
        backend=backend,
    ).backward()
    assert policy.grad is not None and bool((policy.grad[2] == 0).all())


def test_a_masked_row_under_a_factor_that_float_does_not_hold(backend: str) -> None:
    policy, reference = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7).double()
    value = fusedkl.forward_kl(policy, reference, mask=MASK, reduction="sum", backend=backend)
    value.backward(torch.tensor(1e39, dtype=torch.float64))
    assert policy.grad is not None and bool((policy.grad[2] == 0).all())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_temperature_of_numpy(backend: str, dtype: type) -> None:
    pair = torch.randn(2, 1, 9, dtype=torch.float64)
    found = fusedkl.forward_kl(*pair, temperature=dtype(0.7), backend=backend)
    assert found == fusedkl.forward_kl(*pair, temperature=float(dtype(0.7)), backend=backend)


@pytest.mark.parametrize("kind", ["k1+", "k3+"])
def test_an_estimate_whose_square_overflows(kind: str) -> None:
    """The value of the estimator, the derivatives of k2."""
    logprob = torch.tensor([-3.4e38, -1.0, 0.5], requires_grad=True)
    ref_logprob = torch.tensor([-1.0, -2.0, 0.25])
    found = fusedkl.kl_estimate(logprob, ref_logprob, kind)
    plain = fusedkl.kl_estimate(logprob, ref_logprob, kind.removesuffix("+"))
    assert torch.equal(found, plain)
    (slope,) = torch.autograd.grad(found.sum(), logprob, create_graph=True)
    assert torch.equal(slope, logprob - ref_logprob)
    (second,) = torch.autograd.grad(slope.sum(), logprob)
    assert torch.equal(second, torch.ones(3))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_teacher_of_inference_mode(backend: str, reduction: str) -> None:
    """As F.kl_div of softmaxes takes it, and without a copy."""
    with torch.inference_mode():
        reference, mask, weight = torch.randn(3, 7), MASK.clone(), torch.rand(3)
    results = []
    leaf = torch.randn(3, 7)
    for teacher, counted, scale in (
        (reference, mask, weight),
        (reference.clone(), mask.clone(), weight.clone()),
    ):
        policy = leaf.clone().requires_grad_()
        value = fusedkl.divergence(
            policy,
            teacher,
            mask=counted,
            weight=scale,
            reduction=reduction,
            temperature=torch.tensor([1.0, 2.0, 3.0]),
            backend=backend,
        )
        (first,) = torch.autograd.grad(value.sum(), policy, create_graph=True)
        first.sum().backward()
        results.append((value, first, policy.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_other_losses_with_what_inference_mode_made() -> None:
    labels = torch.tensor([0, 1, 2])
    with torch.inference_mode():
        reference, ref_hidden, ref_weight = torch.randn(3, 7), torch.randn(3, 4), torch.randn(7, 4)
        ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
        log_q = torch.log_softmax(torch.randn(3, 7), -1).gather(-1, ids)
        mask = MASK.clone()
    policy, hidden, weight = (torch.randn(s, requires_grad=True) for s in ((3, 7), (3, 4), (7, 4)))
    stats = fusedkl.token_stats(policy, reference, ids[:, 0])
    losses = [
        stats.forward_kl.sum() + stats.logprob.sum(),
        fusedkl.jsd(policy, reference, mask=mask, reduction="mean"),
        fusedkl.topk_divergence(policy, ids, log_q, mask=mask, reduction="mean"),
        fusedkl.distillation_loss(policy, reference, labels, temperature=2.0),
        fusedkl.linear_divergence(
            hidden, weight, ref_hidden=ref_hidden, ref_weight=ref_weight, mask=mask
        ).sum(),
        fusedkl.linear_divergence(hidden, weight, ref_logits=reference).sum(),
    ]
    for i, loss in enumerate(losses):
        leaves = (policy,) if i < 4 else (hidden, weight)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, leaves))


def test_inplace_grad_is_refused_where_autograd_looks_at_no_version() -> None:
    hidden = torch.randn(3, 7, requires_grad=True)

    def losses(hidden: Tensor, **options: bool) -> Tensor:
        logits = hidden * 2
        entropy = fusedkl.entropy(logits).sum()  # keeps the logits too
        other = torch.zeros(3, 7)
        return entropy + fusedkl.forward_kl(logits, other, reduction="sum", **options)

    def step(hidden: Tensor) -> Tensor:
        return losses(hidden, inplace_grad=True)

    with pytest.raises(RuntimeError, match="inplace_grad=True under hooks for saved tensors"):
        checkpoint(step, hidden, use_reentrant=False)
    checkpoint(losses, hidden, use_reentrant=False).backward()
    (expected,) = torch.autograd.grad(losses(hidden), hidden)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected)


def test_checkpointing_keeps_no_gradient_until_backward() -> None:
    """One made ahead would lie there for every chunk."""
    weight = torch.randn(8, 30_000)
    hidden = [torch.randn(16, 8, requires_grad=True) for _ in range(4)]
    reference = torch.randn(16, 30_000)

    def chunk(hidden: Tensor) -> Tensor:
        return fusedkl.forward_kl(hidden @ weight, reference, reduction="sum")

    total = torch.stack([checkpoint(chunk, h, use_reentrant=False) for h in hidden]).sum()
    nodes, seen = [total.grad_fn], []
    while nodes:
        node = nodes.pop()
        seen.append(node)
        nodes += [after for after, _ in node.next_functions if after is not None]
    assert len(seen) > len(hidden)
    assert not any(getattr(node, "ahead", None) is not None for node in seen)
    total.backward()
    assert all(h.grad is not None and bool(h.grad.isfinite().all()) for h in hidden)


def test_statistics_may_be_written_to() -> None:
    policy = torch.randn(3, 7, requires_grad=True)
    stats = fusedkl.token_stats(policy, torch.randn(3, 7), torch.tensor([0, 1, 2]))
    plain = stats.forward_kl.clone()
    kl = stats.forward_kl
    kl *= MASK
    assert torch.equal(kl, plain * MASK)
    kl.sum().backward()
    assert policy.grad is not None and bool((policy.grad[2] == 0).all())


def test_logits_of_a_teacher_below_several_leading_dims() -> None:
    """tail="renormalize" reads the policy where it lies."""
    policy = torch.randn(2, 3, 4, 9)
    ids = torch.rand(2, 3, 4, 9).argsort(-1)[..., :3]
    log_q = torch.log_softmax(torch.randn(2, 3, 4, 3), -1)
    found, flat = (
        fusedkl.topk_divergence(x, i, q, tail="renormalize")
        for x, i, q in (
            (policy, ids, log_q),
            (policy.flatten(0, 2), ids.flatten(0, 2), log_q.flatten(0, 2)),
        )
    )
    assert torch.equal(found.flatten(), flat)


@pytest.mark.parametrize("name", ["token_weight", "mask"])
def test_a_token_of_no_temperature_that_does_not_count(name: str) -> None:
    hidden = torch.randn(2, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=True)
    counted = torch.tensor([True, False])
    value = fusedkl.linear_divergence(
        hidden,
        weight,
        ref_topk=(torch.tensor([[1, 2], [3, 4]]), torch.full((2, 2), -2.0)),
        temperature=torch.tensor([1.0, 0.0]),
        **{name: counted if name == "mask" else counted.float()},
    )
    value.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert bool((hidden.grad[1] == 0).all()) and bool(weight.grad.isfinite().all())


def test_no_second_gradient_is_allocated_beside_one_made_ahead() -> None:
    """A factor that is no power of two: a bfloat16 gradient is computed again."""
    policy = torch.randn(64, 20_000).bfloat16().requires_grad_()
    reference = torch.randn(64, 20_000).bfloat16()
    value = fusedkl.forward_kl(policy, reference, reduction="sum") / 3
    seen: list[int] = []
    backward = ops.run

    def run(name: str, *args: object) -> object:
        if name == "row_stats_backward":
            gc.collect()
            shapes = (t.shape for t in gc.get_objects() if type(t) is Tensor)
            seen.append(sum(shape == policy.shape for shape in shapes))
        return backward(name, *args)

    with mock.patch.object(ops, "run", run):
        value.backward()
    assert seen == [2]  # the logits of both


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_head_of_many_tiles_on_every_backend(backend: str) -> None:
    """The trainers' one, whose tiles the reference backend takes for rows."""
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(9000, 8, requires_grad=True)
    targets = torch.randint(0, 9000, (5,))
    with mock.patch.dict(os.environ, FUSEDKL_BACKEND=backend):
        (found, *_) = trl_functions.ChunkedLogProb.apply(hidden, weight, None, targets, 1.0, 64)
        found.sum().backward()
    logprobs = torch.log_softmax(hidden.detach().double() @ weight.detach().double().T, -1)
    rows = torch.nn.functional.one_hot(targets, 9000) - logprobs.exp()
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(
        hidden.grad.double(), rows @ weight.detach().double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        weight.grad.double(), rows.T @ hidden.detach().double(), rtol=1e-5, atol=1e-5
    )
