"""The derivative of operator linear_stats: an autograd.Function, double backward by composition.

With shards the vocabulary is cut over a group: linear_shards.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from . import divergences, linear_shards
from .autograd import OPS, recorded
from .distributed import Shards, placed, refuse
from .forward_mode import applied
from .linear_arguments import DIFFERENTIABLE, OF_TOKENS, Inputs
from .linear_reference import composed, slopes
from .linear_topk import NAMES
from .saving import keep, kept, ordinary


def _named(forward: Any) -> Any:
    """Says what it takes: without, torch.compile adds a context where no gradient is asked for."""
    kind = inspect.Parameter.POSITIONAL_ONLY
    taken = [inspect.Parameter(name, kind) for name in (*Inputs._fields, "shards")]
    forward.__signature__ = inspect.Signature(taken)
    return forward


class _LinearStats(torch.autograd.Function):
    @staticmethod
    @_named
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        *given, shards = args
        if shards is not None:
            return linear_shards.stats(Inputs(*given), shards)
        out: tuple[Tensor, Tensor] = OPS.linear_stats(*given)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *given, ctx.shards = inputs
        i = Inputs(*given)
        ctx.mark_non_differentiable(output[1])
        ctx.names = [name for name, _ in i.tensors()]
        ctx.rest = i.changed(dict.fromkeys(ctx.names))
        keep(ctx, *[t for _, t in i.tensors()], output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, states = kept(ctx)
        i = ctx.rest.changed(dict(zip(ctx.names, tensors, strict=True)))
        wanted = list(ctx.needs_input_grad[:DIFFERENTIABLE])
        grad = grads[0].contiguous() if i.mask is None else torch.where(i.mask, grads[0], 0)
        found: list[Tensor | None]
        if recorded(*i.differentiable(), grad):
            refuse(ctx.shards, "double backward")
            found = _composed_gradients(grad, i, wanted)
        else:
            of_slice = ctx.shards is not None
            got = OPS.linear_stats_backward(grad, *i, states, wanted, of_slice)
            found = [g if ask else None for g, ask in zip(got, wanted, strict=True)]
            if of_slice:
                found = linear_shards.summed(found, i, ctx.shards)
        return *found, *[None] * (len(i) + 1 - DIFFERENTIABLE)

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
    fresh = {n: ordinary(t.view_as(t)) for n, t in i.tensors() if n in i._fields[:DIFFERENTIABLE]}
    given = dict(fresh)
    number = {side: _numbers(i, side) for side in ("policy", "reference")}
    for name in OF_TOKENS:  # what other tokens hold would reach the weights as 0 * NaN
        if name in given:
            given[name] = torch.where(number[_side(name)][:, None], given[name], 0)
    values = composed(i.changed(given))
    found = slopes(values, [fresh[n] for n in names], grad, create_graph=True)
    # not above, where a gradient of torch.func's would hide that values depend on the tokens
    lost = _lost(grad, i, number)
    got = {}
    for name, g in zip(names, found, strict=True):
        own = lost[_side(name)]
        if name == "weight" and i.ref_hidden is not None and i.ref_weight is None:  # of both sides
            own = own + lost["reference"]
        got[name] = g + (own[:, None] if name in OF_TOKENS else own.sum()).to(g.dtype)
    return [got.get(name) for name in i._fields[:DIFFERENTIABLE]]


def _side(name: str) -> str:
    return "reference" if name.startswith("ref_") else "policy"


def _numbers(i: Inputs, side: str) -> Tensor:
    """The tokens that count and hold no NaN and no infinity on this side."""
    number = torch.ones(i.hidden.shape[:1], dtype=torch.bool, device=i.hidden.device)
    for name in OF_TOKENS:
        t = getattr(i, name)
        if t is not None and _side(name) == side:
            absent = t == -torch.inf if name == "ref_logits" else False  # not a token of the row
            number = number & (t.isfinite() | absent).all(-1)
    return number if i.mask is None else number & i.mask


def _lost(grad: Tensor, i: Inputs, number: dict[str, Tensor]) -> dict[str, Tensor]:
    """By side, NaN for the tokens of which a value that is asked for is no number, 0 for others."""
    per_row = 0 if i.token_ids is None else i.token_ids.shape[1]
    reads = [
        divergences.FIELDS[name].side
        for name in i.fields
        for _ in range(divergences.value_rows([name], per_row))
    ]
    if i.topk_ids is not None:
        reads = ["policy"] * (i.topk_ids.shape[1] + 1)
    reads += ["policy"] * (len(grad) - len(reads))  # the labels
    asked = {side: torch.zeros_like(number["policy"]) for side in ("policy", "reference", "both")}
    for side, row in zip(reads, grad, strict=True):
        asked[side] = asked[side] | (row != 0)
    bad = {side: ~each for side, each in number.items()}
    found = {}
    for side in bad:
        none = bad[side] & asked[side] | (bad["policy"] | bad["reference"]) & asked["both"]
        none = none if i.mask is None else none & i.mask
        found[side] = torch.where(none, torch.nan, 0.0)
    return found


def linear_stats(inputs: Inputs, shards: Shards | None = None) -> Tensor:
    """Values [R, N] of operator linear_stats, differentiable in its first seven arguments.

    With shards the weights are slices, and ids are of the whole vocabulary.
    """
    if shards is None:
        values: Tensor = applied(_LinearStats, *inputs, None)[0]
        return values
    if inputs.backend == "reference":
        raise ValueError("backend='reference' has no lm_head of slices (group=)")

    def of(place: Shards) -> Tensor:
        local = linear_shards.of_slice(inputs, place)
        out: Tensor = applied(_LinearStats, *local, place)[0]
        return out

    values, shards = placed(shards, of)
    ids = {
        "token_ids": inputs.token_ids,
        "labels": inputs.labels,
    }
    for name, t in ids.items():
        if t is not None:
            shards._replace(ids_name=name).check_ids(t, inputs.mask)
    if inputs.topk_ids is not None:
        shards._replace(ids_name=NAMES[0]).check_topk(inputs.topk_ids)
    return values
