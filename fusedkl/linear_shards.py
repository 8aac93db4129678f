"""`linear_stats` where each rank of a group holds the lm_head rows of its slice of the vocabulary.

Hidden states are the same on every rank. Backward adds up their gradients over the ranks, the one
thing that is sent there; those of weights and biases are the rank's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference, shard_states
from .autograd import OPS, recorded
from .distributed import Shards, gather, refuse, total
from .linear_ops import DIFFERENTIABLE, OF_HIDDEN, Inputs


class _ShardedLinearStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Shards, *args: Any) -> Tensor:
        i = Inputs(*args)
        if shards.size > 0:
            state = OPS.linear_stats(*args)[1][0]
        else:
            state = shard_states.empty_state(i.hidden)
        dtype = i.result_dtype()
        fields = tuple(i.fields)
        payload = shard_states.pack(state, [], fields, i.inv_temperature, dtype)
        values, state = OPS.merge_shards(
            gather(payload, fields, i.inv_temperature, shards, i.backend),
            i.fields, i.inv_temperature, i.mask, None, i.backend,
        )  # fmt: skip
        ctx.shards, ctx.names = shards, [name for name, _ in i.tensors()]
        ctx.rest = i.changed(dict.fromkeys(ctx.names))
        ctx.save_for_backward(*[t for _, t in i.tensors()], state[None])
        out: Tensor = values.to(dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors
        i = ctx.rest.changed(dict(zip(ctx.names, tensors, strict=True)))
        wanted = list(ctx.needs_input_grad[1 : 1 + DIFFERENTIABLE])
        grad = grads[0].contiguous() if i.mask is None else torch.where(i.mask, grads[0], 0)
        if recorded(*i.differentiable(), grad):
            refuse(ctx.shards, "double backward")
        if ctx.shards.size > 0:
            got = OPS.linear_stats_backward(grad, *i, states, wanted, True)
        else:
            got = [None if t is None else torch.zeros_like(t) for t in i.differentiable()]
        found = [g if ask else None for g, ask in zip(got, wanted, strict=True)]
        for at, name in enumerate(i._fields[:DIFFERENTIABLE]):
            part = found[at]
            if name in OF_HIDDEN and part is not None:
                wide = part.to(reference.result_dtype(part, None))  # zeros of an empty slice
                found[at] = total(wide, ctx.shards).to(getattr(i, name).dtype)
        return None, *found, *[None] * (len(i) - DIFFERENTIABLE)


def linear_stats(inputs: Inputs, shards: Shards) -> Tensor:
    """Values [R, N] of operator linear_stats, of the whole vocabulary."""
    if inputs.backend == "reference":
        raise ValueError("backend='reference' has no linear_divergence of slices (group=)")
    out: Tensor = _ShardedLinearStats.apply(shards, *inputs)
    return out
