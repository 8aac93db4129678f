"""Operator `linear_stats` where each rank of a group holds the lm_head rows of its slice.

Hidden states are the same on every rank. Forward: the first sweep over the tiles of the slice, one
gather of its states, and where there is a second sweep, its sums over the group. Backward adds up
the gradients of hidden states over the ranks, the one thing that is sent there; those of weights
and biases are the rank's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import distributed, reference, shard_states
from .autograd import OPS
from .backends import needs
from .distributed import Payload, Shards, gather, total
from .linear_arguments import DIFFERENTIABLE, OF_HIDDEN, Inputs
from .linear_ops import questions
from .linear_topk import outcomes
from .sliced_rows import put_sums, second_sweep

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def shards_of(group: ProcessGroup, i: Inputs, kind: str, temperature: float | Tensor) -> Shards:
    """This rank's place, after all ranks were found to make the same call."""
    weights = (i.weight, i.ref_weight, i.ref_hidden, i.ref_logits)
    ids = {"token_ids": i.token_ids, "ref_topk": i.topk_ids, "labels": i.labels}
    given = {name: t.shape[1] if t.dim() > 1 else 1 for name, t in ids.items() if t is not None}
    found = distributed.shards(
        group,
        i.hidden.new_empty(()).expand(i.hidden.shape[0], i.weight.shape[0]),  # no memory
        ids_name=next(iter(given), None),
        kind=kind,
        dtype=" ".join(needs(*(t for t in weights if t is not None))),
        temperature=temperature,
        softcap=" ".join(f"{v}" for v in (*i.softcaps, *i.scales)),
        ids=" ".join(f"{name} {k}" for name, k in given.items()),
    )
    assert found is not None
    return found


def stats(i: Inputs, shards: Shards) -> tuple[Tensor, Tensor]:
    """Values [R, N] and states [Q, N, S] of operator linear_stats, of the whole vocabulary."""
    asked = questions(i)
    tokens, states = OPS.linear_slice(*i)
    rows = tokens.split([len(one.token_sides()) * one.per_row() for one in asked])
    sent = i.sent_dtype()
    payloads = []
    for one, logits, state in zip(asked, rows, states, strict=True):
        fields = tuple(one.fields)
        numbers = shard_states.pack(state, [logits.t()], fields, one.inverse, sent)
        payloads.append(Payload(numbers, fields, one.inverse))
    found = []
    for one, gathered in zip(asked, gather(payloads, shards, i.backend), strict=True):
        values, state = OPS.merge_shards(gathered, one.fields, one.inverse, i.mask, None, i.backend)
        if second_sweep(one.fields):
            sums = total(OPS.linear_sums(*i, state), shards)
            state = put_sums(values, state, sums, one.fields, one.parameter)
        elif one.apart is not None:  # held by one rank each, 0 on the others
            logits = gathered[..., -one.per_row() :].sum(0).t().to(state.dtype)
            values = outcomes(logits, state, one.inverse)
        if i.mask is not None:
            values = values.masked_fill(~i.mask, 0)
        found.append((values, state))
    return (
        torch.cat([values for values, _ in found]).to(i.result_dtype()),
        torch.stack([state for _, state in found]),
    )


def summed(found: list[Tensor | None], i: Inputs, shards: Shards) -> list[Tensor | None]:
    """Gradients of a slice: those of hidden states over all ranks, rounded once."""
    out = list(found)
    for at, name in enumerate(i._fields[:DIFFERENTIABLE]):
        part = found[at]
        if name in OF_HIDDEN and part is not None:
            wide = part.to(reference.result_dtype(part, None))
            out[at] = total(wide, shards).to(getattr(i, name).dtype)
    return out


def of_slice(i: Inputs, shards: Shards) -> Inputs:
    """Ids of the whole vocabulary as those of this slice."""
    ids = {
        "token_ids": i.token_ids,
        "topk_ids": i.topk_ids,
        "labels": None if i.labels is None else i.labels[:, None],
    }
    found = {name: shards.local_ids(t) for name, t in ids.items() if t is not None}
    if i.topk_ids is not None:  # padding is nowhere, and no mistake
        found["topk_ids"] = torch.where(i.topk_ids < 0, -1, found["topk_ids"])
    if "labels" in found:
        found["labels"] = found["labels"][:, 0]
    return i.changed(found)
