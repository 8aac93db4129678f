"""The composition in plain torch, float64, with logits in full: for checking and differentiating.

Behind the reference backend, over blocks of tokens, and behind double backward on every backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference_backend import _recording as recording
from .reference_backend import blocks


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    dtype = reference.inside(hidden.device)
    out = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        out = out + bias.to(dtype)
    return _capped(out * scale, softcap)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    if not softcap:
        return logits
    finite = ~((logits == -torch.inf) | logits.isnan())  # 0 times the slope at NaN would be NaN
    capped = torch.tanh(torch.where(finite, logits, 0) / softcap) * softcap
    return torch.where(finite, capped, logits)


def composed(i: Any) -> Tensor:
    """Values [R, N] of operator linear_stats, for its `Inputs`; differentiable, masks aside."""
    x = _logits(i.hidden, i.weight, i.bias, i.scales[0], i.softcaps[0])
    y = None
    if i.ref_logits is not None:
        y = _capped(i.ref_logits.to(x.dtype) * i.scales[1], i.softcaps[1])
    elif i.ref_hidden is not None:
        weight = i.weight if i.ref_weight is None else i.ref_weight
        y = _logits(i.ref_hidden, weight, i.ref_bias, i.scales[1], i.softcaps[1])
    inverse = i.inv_temperature
    found = []
    if i.topk_ids is not None:
        found.append(_outcomes(x, i.topk_ids, inverse, i.mask))
    elif i.fields:
        found.append(
            reference.rows(x, y, i.token_ids, i.fields, i.parameter, inverse, i.mask, None, None)[0]
        )
    if i.labels is not None:
        hard = (x, None, i.labels[:, None], ["logprob"], None, None, i.mask, None, None)
        found.append(reference.rows(*hard)[0])
    return torch.cat(found)


def _outcomes(x: Tensor, ids: Tensor, inverse: Tensor | None, mask: Tensor | None) -> Tensor:
    """[K + 1, n]: logits over T of the tokens, 0 for padding, and logsumexp of all others."""
    if inverse is not None and mask is not None:  # of a masked token it may be anything
        inverse = torch.where(mask, inverse, 1)
    scaled = x if inverse is None else x * inverse.to(x.dtype)[:, None]
    width = x.shape[1]
    given = (ids >= 0) & (ids < width)
    # of no token, where nobody has looked
    none = torch.where(ids < width, 0.0, torch.nan).to(x.dtype)
    tokens = torch.where(given, scaled.gather(1, torch.where(given, ids, 0)), none)
    apart = scaled.new_zeros(x.shape[0], width + 1, dtype=torch.bool)
    apart = apart.scatter(1, torch.where(given, ids, width), True)[:, :-1]
    rest = torch.where(apart, -torch.inf, scaled)
    empty = (rest == -torch.inf).all(1)
    finite = torch.where(empty[:, None], 0, rest).logsumexp(1)  # no NaN in its gradient
    found = torch.cat([tokens, torch.where(empty, -torch.inf, finite)[:, None]], 1)
    return (found if mask is None else torch.where(mask[:, None], found, 0)).t()


def slopes(
    values: Tensor, leaves: list[Tensor], grad: Tensor, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of `composed`; 0 to what none of the values depends on."""
    if not values.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(
        values, leaves, grad.to(values.dtype), create_graph=create_graph, materialize_grads=True
    )


def _with_temperatures(i: Any) -> Any:
    """Those of masked tokens may be anything, and must not reach the weights as 0 * NaN."""
    if i.mask is None or i.inv_temperature is None or i.inv_temperature.numel() == 1:
        return i
    return i._replace(inv_temperature=torch.where(i.mask, i.inv_temperature, 1))


def values(i: Any) -> Tensor:
    """Operator linear_stats, values only."""
    i = _with_temperatures(i)
    n, width = i.hidden.shape[0], i.weight.shape[0]
    parts = [composed(i.tokens(_range(block, i.hidden))) for block in blocks(n, width)]
    return torch.cat(parts, -1)


def gradients(grad: Tensor, i: Any, states: Tensor, wanted: list[bool]) -> list[Tensor | None]:
    """Operator linear_stats_backward, by autograd through `composed`."""
    i = _with_temperatures(i)
    names = [name for name, ask in zip(i._fields, wanted, strict=False) if ask]
    per_token = ("hidden", "ref_hidden", "ref_logits")
    total: dict[str, list[Tensor]] = {name: [] for name in names}
    for block in blocks(i.hidden.shape[0], i.weight.shape[0]):
        with recording():
            part = i.tokens(_range(block, i.hidden))
            leaves = {name: getattr(part, name).detach().requires_grad_() for name in names}
            out = composed(part._replace(**leaves))
            found = slopes(out, list(leaves.values()), grad[:, block])
        for name, gradient in zip(names, found, strict=True):
            kept = total[name]
            wide = gradient.to(reference.inside(gradient.device))
            if name in per_token or not kept:
                kept.append(wide)
            else:
                kept[0] += wide
    joined = {name: torch.cat(parts) for name, parts in total.items()}
    return [joined.get(name) for name in i._fields[: len(wanted)]]


def _range(block: slice, like: Tensor) -> Tensor:
    return torch.arange(block.start, block.stop, device=like.device)
