"""Deferred softmaxes in autograd: functions of others, checkpoints, hooks, double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kl_div_cases import needs_kernel
from patch_cases import (  # noqa: F401 (fixtures)
    LOSSES,
    agree,
    both,
    logits,
    nothing_left_behind,
    poisoned_memory,
)
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fusedkl

pytestmark = needs_kernel


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a * a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grads[0]


FOREIGN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "function": lambda x, y: Square.apply(F.log_softmax(x, -1)),  # type: ignore[no-untyped-call]
    "kl none": lambda x, y: Square.apply(  # type: ignore[no-untyped-call]
        F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
    ),
    "reentrant": lambda x, y: F.kl_div(
        checkpoint(F.log_softmax, x, -1, use_reentrant=True), F.softmax(y, -1), reduction="sum"
    ),
    "checkpoint": lambda x, y: F.kl_div(
        checkpoint(F.log_softmax, x, -1, use_reentrant=False), F.softmax(y, -1), reduction="sum"
    ),
    "whole": lambda x, y: checkpoint(LOSSES["batchmean"], x, y, use_reentrant=False),
    "whole, reentrant": lambda x, y: checkpoint(LOSSES["batchmean"], x, y, use_reentrant=True),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_gradients_through_other_functions_and_checkpoints(name: str) -> None:
    x, y = logits()
    agree(both(FOREIGN[name], x, y), 1e-5)
    agree(both(FOREIGN[name], x, y.requires_grad_()), 1e-5)


def _save_softmaxes(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    keep = "softmax" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_save_softmaxes)


REGIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "product": lambda p, q, x: (p * q * torch.softmax(x / 2, -1)).sum(-1),
    "kl_div": lambda p, q, x: F.kl_div(p, q, reduction="sum"),
    "rows": lambda p, q, x: F.kl_div(p, q, reduction="none").sum(-1),
}


@pytest.mark.parametrize("selective", [False, True], ids=["all", "selective"])
@pytest.mark.parametrize("name", REGIONS)
def test_a_checkpoint_of_what_uses_earlier_softmaxes(name: str, selective: bool) -> None:
    """The region's recomputation finds their results: its first run may not save more."""
    contexts: dict[str, Any] = {"context_fn": _selective} if selective else {}

    def loss(x: Tensor, y: Tensor) -> Tensor:
        p, q = F.log_softmax(x, -1), F.softmax(y, -1)
        inside = checkpoint(lambda a: REGIONS[name](a, q, x), p, use_reentrant=False, **contexts)
        total: Tensor = inside.sum() + (p.exp() * p).sum() + q.square().sum()
        return total

    x, y = logits()
    agree(both(loss, x, y), 1e-5)
    agree(both(loss, x, y.requires_grad_()), 1e-5)


def test_a_checkpoint_that_sums_an_earlier_kl_div() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        kl = F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
        inside: Tensor = checkpoint(lambda k: k.sum(-1), kl, use_reentrant=False)
        return inside.sum() + kl.square().sum()

    agree(both(loss, *logits()), 1e-5)


def test_saved_tensors_pass_the_hooks_of_the_call() -> None:
    x, _ = logits()
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.detach())
        return packed[-1]

    wanted = torch.softmax(x, -1)
    with fusedkl.patch():
        q, other = F.softmax(x, -1), F.softmax(x, -1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                total = q.sum()
                assert not packed  # nothing but the softmax is saved
            held = F.softmax(x, -1)
            packed.clear()
            held.sum()
            assert len(packed) == 1 and torch.equal(packed[0], wanted)
            x.exp()
            assert len(packed) == 2  # the hooks are back
        q *= 2
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()  # which does not look at what hooks hold
    assert torch.equal(other * 1, wanted)


def test_double_backward() -> None:
    x, y = logits(torch.float64)

    def curvature(a: Tensor, b: Tensor) -> Tensor:
        total = LOSSES["temperature"](a, b) + FOREIGN["function"](a, b).sum()
        (g,) = torch.autograd.grad(total, a, create_graph=True)
        return g.square().sum()

    agree(both(curvature, x, y), 1e-8)


OFF_THE_GRAPH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "requires_grad_": lambda x, z: x.requires_grad_(False),
    "detach_": lambda x, z: z.detach_(),
}
LATER: dict[str, Callable[[Tensor, Tensor, Callable[[], object]], Tensor]] = {}


def _later(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    LATER[function.__name__] = function
    return function


@_later
def summed(x: Tensor, y: Tensor, cut: Callable[[], object]) -> Tensor:
    p, q = F.log_softmax(x, -1), F.softmax(y, -1)
    cut()
    return F.kl_div(p, q, reduction="sum") + (p.exp() * p).sum()


@_later
def rows(x: Tensor, y: Tensor, cut: Callable[[], object]) -> Tensor:
    kl = F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="none")
    cut()
    return kl.sum(-1)


@_later
def used_before(x: Tensor, y: Tensor, cut: Callable[[], object]) -> Tensor:
    p = F.log_softmax(x, -1)
    first = p.exp().square().sum()
    cut()
    return first + p[:, 0].sum()


@pytest.mark.parametrize("teacher", [False, True], ids=["policy", "both"])
@pytest.mark.parametrize("way", OFF_THE_GRAPH)
@pytest.mark.parametrize("name", LATER)
def test_logits_that_come_off_the_graph_before_the_result(
    name: str, way: str, teacher: bool
) -> None:
    """requires_grad_(False) of a leaf: no gradient, no error. detach_(): the gradient of before."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = x if way == "requires_grad_" else x * 2
        return LATER[name](z, y, lambda: OFF_THE_GRAPH[way](x, z))

    x, y = logits()
    results = both(loss, x, y.requires_grad_(teacher))
    assert (results[0][1][0] is None) == (way == "requires_grad_")
    agree(results, 1e-5)


def in_place(x: Tensor, y: Tensor) -> Tensor:
    p = checkpoint(F.softmax, x, -1, use_reentrant=True)
    p[:, 0] = 0
    p.mul_(3)
    return (p * F.softmax(y, -1)).sum()


def hooked(x: Tensor, y: Tensor) -> Tensor:
    p = checkpoint(F.softmax, x, -1, use_reentrant=True)
    p.register_hook(lambda g: 5 * g)
    p.retain_grad()
    return (p * F.softmax(y, -1)).sum()


def reshaped(x: Tensor, y: Tensor) -> Tensor:
    p = checkpoint(F.softmax, x, -1, use_reentrant=True)
    p.unsqueeze_(0)
    return (p[0, :, 1] * y[:, 0]).sum()


class Sevens(torch.autograd.Function):
    """A forward with gradients on: what it returns has a graph, which is not its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.log_softmax(x, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.full_like(grads[0], 7)


def own_backward(x: Tensor, y: Tensor) -> Tensor:
    p = Sevens.apply(x)  # type: ignore[no-untyped-call]
    return F.kl_div(p, F.softmax(y, -1), reduction="sum") + (p * y).sum()


def new_leaf(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    p = F.log_softmax(z, -1)
    z.detach_().requires_grad_()
    return F.kl_div(p, F.softmax(y, -1), reduction="sum") + p.exp().square().sum()


@pytest.mark.parametrize("loss", [in_place, hooked, reshaped, own_backward, new_leaf])
def test_what_becomes_of_a_result_that_others_returned(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Found by reading; patched, gradients went past what was done to the result."""
    x, y = logits()
    agree(both(loss, x, y), 1e-5)
