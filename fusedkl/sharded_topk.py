"""`topk_logprobs` on rows of which each rank of a group holds a slice.

The K tokens are somewhere, all others everywhere: each rank sends logsumexp of the others of its
slice, in two parts, and the logits of those of the K that it holds. 2 + K numbers a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference, shard_states
from .autograd import OPS, recorded
from .distributed import Payload, Shards, gather, placed, refuse
from .reference_merge import total as merged_total
from .sliced_rows import token_logits

# A payload of this: logsumexp, and logits of tokens.
_SENT = ("logsumexp",)


class _ShardedTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        policy: Tensor,
        token_ids: Tensor,
        padding: Tensor,
        inv_temperature: Tensor | None,
        mask: Tensor | None,
        shards: Shards,
        backend: str,
    ) -> Tensor:
        inner, dtype = reference.inside(policy.device), reference.result_dtype(policy, None)
        inv_t = shard_states.scale(inv_temperature, policy.new_ones(1, dtype=inner))
        nothing = torch.zeros(token_ids.shape[0], dtype=inner, device=policy.device)
        top, rest = nothing, nothing - torch.inf
        if shards.size > 0:
            _, state = OPS.topk_logprobs(policy, token_ids, inv_temperature, mask, backend)
            top, rest = state[:, 2], state[:, 3]
        writer = shard_states.Writer(dtype, dtype != inner, inv_t)
        writer.logsumexp(top, rest)
        tokens = token_logits(policy, token_ids).to(dtype)
        payload = torch.cat([torch.stack(writer.out, -1), tokens], -1)
        (found,) = gather([Payload(payload, _SENT, inv_temperature)], shards, backend)
        found = found.to(inner)
        top, rest = found[..., 0], found[..., 1]
        if writer.narrow:
            top = top * inv_t
        top, rest, _ = merged_total(top, rest)
        logits = found[..., 2:].sum(0) * inv_t[:, None]
        logits = torch.where(padding, -torch.inf, logits).t()
        # the others first, then the tokens: outcomes of one row
        tops = torch.cat([top[None], torch.where(logits == -torch.inf, 0, logits)])
        masses = torch.where(logits == -torch.inf, -torch.inf, logits - logits)  # NaN stays
        row_top, row_rest, share = merged_total(tops, torch.cat([rest[None], masses]))
        nowhere = (share == -torch.inf).all(0)
        share = torch.where(nowhere, torch.nan, share)
        values = torch.cat([torch.where(padding, 0, share[1:].t()), share[:1].t()], -1)
        if mask is not None:
            values = torch.where(mask[:, None], values, 0)
        row_rest = torch.where(nowhere, torch.nan, row_rest)
        ctx.save_for_backward(
            policy,
            token_ids,
            inv_temperature,
            mask,
            torch.stack([row_top, row_rest, top, rest], -1),
        )
        ctx.shards, ctx.backend = shards, backend
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        policy, token_ids, inv_temperature, mask, state = ctx.saved_tensors
        grad = grads[0] if mask is None else torch.where(mask[:, None], grads[0], 0)
        if recorded(policy, grad):
            refuse(ctx.shards, "double backward")
        if ctx.shards.size == 0:
            gradient = torch.zeros_like(policy)
        else:
            gradient = OPS.topk_logprobs_backward(
                grad.contiguous(), policy, token_ids, state, inv_temperature, ctx.backend
            )
        return gradient, None, None, None, None, None, None


def topk_logprobs(
    policy: Tensor,
    token_ids: Tensor,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    shards: Shards,
    *,
    backend: str,
) -> Tensor:
    """[N, K + 1] of operator topk_logprobs, of whole rows and with ids of the whole vocabulary."""
    if backend != "cpu":
        raise ValueError(
            f"backend={backend!r} has no topk_divergence of slices (group=); the cpu backend does"
        )

    def of(place: Shards) -> Tensor:
        out: Tensor = _ShardedTopk.apply(
            policy, place.local_ids(token_ids), token_ids < 0, inv_temperature, mask, place, backend
        )
        return out

    found, shards = placed(shards, of)
    shards.check_topk(token_ids)
    return found
