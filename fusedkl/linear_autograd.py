"""The derivative of operator linear_stats: an autograd.Function, double backward by composition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd import OPS, recorded
from .forward_mode import applied
from .linear_ops import DIFFERENTIABLE, Inputs
from .linear_reference import composed


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = OPS.linear_stats(*args)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        i = Inputs(*inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.names = [name for name, _ in i.tensors()]
        ctx.rest = i.changed(dict.fromkeys(ctx.names))
        ctx.save_for_backward(*[t for _, t in i.tensors()], output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors
        i = ctx.rest.changed(dict(zip(ctx.names, tensors, strict=True)))
        wanted = list(ctx.needs_input_grad[:DIFFERENTIABLE])
        grad = grads[0].contiguous() if i.mask is None else torch.where(i.mask, grads[0], 0)
        found: list[Tensor | None]
        if recorded(*i.differentiable(), grad):
            found = _composed_gradients(grad, i, wanted)
        else:
            got = OPS.linear_stats_backward(grad, *i, states, wanted, False)
            found = [g if ask else None for g, ask in zip(got, wanted, strict=True)]
        return *found, *[None] * (len(i) - DIFFERENTIABLE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        raise RuntimeError(
            "linear_divergence and linear_token_stats have no torch.vmap, nor what uses it "
            "(jacfwd, hessian): a batch of tokens is only more tokens; give them in one call"
        )


def _composed_gradients(grad: Tensor, i: Inputs, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients as a differentiable composition."""
    names = [name for name, ask in zip(i._fields, wanted, strict=False) if ask]
    # Fresh views: a reference computed from the policy must not lead this gradient back to it.
    fresh = {n: t.view_as(t) for n, t in i.tensors() if n in i._fields[:DIFFERENTIABLE]}
    given = dict(fresh)
    if i.mask is not None:  # what masked tokens hold would reach the weights as 0 * NaN
        for name in {"hidden", "ref_hidden", "ref_logits"} & given.keys():
            given[name] = torch.where(i.mask[:, None], given[name], 0)
    values = composed(i.changed(given))
    found = torch.autograd.grad(
        values, [fresh[n] for n in names], grad.to(values.dtype), create_graph=True
    )
    got = dict(zip(names, found, strict=True))
    return [got.get(name) for name in i._fields[:DIFFERENTIABLE]]


def linear_stats(inputs: Inputs) -> Tensor:
    """Values [R, N] of operator linear_stats, differentiable in its first seven arguments."""
    values, _ = applied(_LinearStats, *inputs)
    out: Tensor = values
    return out
