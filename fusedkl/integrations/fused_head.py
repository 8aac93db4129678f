"""Per-token numbers of language-model heads, one output per field, as trainers ask for them.

Unlike the operator behind `linear_divergence`, a field that nobody differentiates costs nothing in
backward, and a watcher sees each tile of the logits: for the metrics that trainers log.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import divergences, linear_reference
from ..linear_arguments import DIFFERENTIABLE, Inputs
from ..linear_backward import Wanted, backward
from ..linear_ops import engine_of
from ..linear_tiles import Rows, forward

Watcher = Callable[[Tensor, slice, slice], None]


def head_numbers(inputs: Inputs, watch: Watcher | None = None) -> dict[str, Tensor]:
    """{field: [N]} of `inputs.fields`, float32 (float64 for float64 hidden states).

    Differentiable once, in hidden, weight and bias of the policy. token_ids: [N, 1]. `watch` gets
    each tile of the policy's logits: the tile, valid until it returns, its tokens, its columns.
    """
    values = _HeadNumbers.apply(inputs.hidden, inputs.weight, inputs.bias, inputs, watch)
    return dict(zip(inputs.fields, values, strict=True))


class _HeadNumbers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: Inputs,
        watch: Watcher | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        i = inputs.detached()
        if hidden.shape[0] == 0:
            state = None
            values = hidden.new_zeros((len(i.fields), 0), dtype=i.result_dtype())
        else:
            ((values, state),) = forward(engine_of(i), [_question(i)], watch)
        ctx.names = [name for name, _ in i.tensors()]
        ctx.rest = i.changed(dict.fromkeys(ctx.names))
        given = {"hidden": hidden, "weight": weight, "bias": bias}  # not their detached forms
        ctx.save_for_backward(*[given.get(name, t) for name, t in i.tensors()], state)
        return tuple(value.to(i.result_dtype(), copy=True) for value in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, state = ctx.saved_tensors
        i = ctx.rest.changed(dict(zip(ctx.names, tensors, strict=True))).detached()
        wanted = Wanted(*ctx.needs_input_grad[:3])
        asked = [(name, g) for name, g in zip(i.fields, grads, strict=True) if g is not None]
        if not asked:
            return (None,) * 5
        if state is None:
            none = [torch.zeros_like(t) if ask else None for t, ask in zip(i, wanted, strict=False)]
            return (*none[:3], None, None)
        i = _about(i, [name for name, _ in asked])
        grad = torch.stack([g for _, g in asked])
        if i.backend == "reference":  # whose gradients are of whole rows, and not of tiles
            given = [*ctx.needs_input_grad[:3], *[False] * (DIFFERENTIABLE - 3)]
            whole = linear_reference.gradients(grad, i, state, given)[:3]
            dtype = i.hidden.dtype  # that of weight and bias too
            return *(None if g is None else g.to(dtype) for g in whole), None, None
        made, _ = backward(engine_of(i), [_question(i)], [grad], [state], (wanted, Wanted()))
        to_hidden = None if made.hidden is None else made.hidden.to(i.hidden.dtype)
        return to_hidden, made.weight, made.bias, None, None


def _question(i: Inputs) -> Rows:
    return Rows(i.fields, i.parameter, i.token_ids, i.inv_temperature, i.backend, paired=i.paired)


def _about(i: Inputs, fields: list[str]) -> Inputs:
    """What these fields need: without the reference's logits if none of them does."""
    needs = [divergences.FIELDS[name] for name in fields]
    if not any(field.needs_reference for field in needs):
        i = i._replace(ref_hidden=None, ref_weight=None, ref_bias=None, ref_logits=None)
    if not any(field.needs_token_ids for field in needs):
        i = i._replace(token_ids=None)
    return i._replace(fields=fields)
