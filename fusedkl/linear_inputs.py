"""The arguments of linear_divergence and linear_token_stats, checked, for the operator."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from . import contents, reductions, validation
from .autograd import intercepted
from .backends import needs, resolve
from .layout import dense, inverse_temperature
from .linear_arguments import Inputs

PRECISIONS = (None, "fast")
WIDTH = ("H", "hidden size")


def options(
    precision: str | None,
    tile: tuple[int, int] | None,
    scales: tuple[float, float],
    softcaps: tuple[float | None, float | None],
) -> None:
    """What can be said of them without a tensor."""
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be None or "fast"; got {precision!r}')
    for name, value in zip(("logit_scale", "ref_logit_scale"), scales, strict=True):
        _number(name, value)
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite; got {value}")
    for name, cap in zip(("softcap", "ref_softcap"), softcaps, strict=True):
        if cap is not None:
            _number(name, cap)
            if not 0 < cap < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {cap}")
    if tile is not None:
        _tile(tile)


def per_token(
    hidden: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    weight: Tensor | None,
    *others: object,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """1/T, what counts, and weights, as [N]; others: what else the results' dtype depends on."""
    inverse = inverse_temperature(temperature, hidden)
    counted = reductions.counted_tokens(hidden, mask, labels, ignore_index)
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in (hidden, *others))
    dtype = torch.float64 if wide else torch.float32
    weights = reductions.token_weights(hidden, weight, dtype, "token_weight")
    if inverse is not None and inverse.device.type == "cpu" and not intercepted(inverse):
        # here, since not all that reads them looks at them
        contents.temperatures(inverse, reductions.rows_to_read(counted, weights))
    return inverse, counted, weights


def inputs_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logits: Tensor | None,
    fields: tuple[str, ...],
    precision: str | None,
    tile: tuple[int, int] | None,
    scales: tuple[float, float],
    softcaps: tuple[float | None, float | None],
    backend: str | None,
    sliced: bool = False,
) -> Inputs:
    """The two heads, checked, with tokens flattened."""
    options(precision, tile, scales, softcaps)
    if ref_weight is weight:
        ref_weight = None
    hidden, weight = _autocast(hidden), _autocast(weight)
    bias, ref_bias = _autocast(bias), _autocast(ref_bias)
    ref_hidden, ref_weight = _autocast(ref_hidden), _autocast(ref_weight)
    _head("", hidden, weight, bias, sliced)
    if ref_logits is not None:
        validation.logits("ref_logits", ref_logits, sliced)
    if ref_hidden is not None:
        validation.logits("ref_hidden", ref_hidden, last=WIDTH)
        if ref_logits is not None:
            raise ValueError(
                "one form of reference is accepted; got ref_hidden of shape "
                f"{list(ref_hidden.shape)} and ref_logits of shape {list(ref_logits.shape)}"
            )
        _head("ref_", ref_hidden, weight if ref_weight is None else ref_weight, ref_bias, sliced)
        _alike("ref_hidden", ref_hidden, hidden)
        if ref_weight is not None and ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                "weight and ref_weight must have one vocabulary; got shapes "
                f"{list(weight.shape)} and {list(ref_weight.shape)}"
            )
    elif ref_weight is not None or ref_bias is not None:
        name = "ref_weight" if ref_weight is not None else "ref_bias"
        raise ValueError(f"{name} needs ref_hidden")
    if ref_logits is not None:
        _alike("ref_logits", ref_logits, hidden)
        if ref_logits.shape[-1] != weight.shape[0]:
            raise ValueError(
                f"ref_logits must have weight's vocabulary, {list(weight.shape)}; "
                f"got {list(ref_logits.shape)}"
            )
        ref_logits = dense(ref_logits)
    return Inputs(
        _flat(hidden), weight, bias, None if ref_hidden is None else _flat(ref_hidden), ref_weight,
        ref_bias, None if ref_logits is None else _flat(ref_logits), None, None, None, list(fields),
        None, None, None, [float(s) for s in scales], [float(c or 0) for c in softcaps],
        precision == "fast", [] if tile is None else list(tile),
        resolve(backend, hidden.device, needs(hidden, ref_hidden, ref_logits, *fields)),
    )  # fmt: skip


def _autocast(t: Any) -> Any:
    """As torch.nn.functional.linear casts its arguments under autocast."""
    if not isinstance(t, Tensor) or t.dtype == torch.float64 or not t.is_floating_point():
        return t
    device = t.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return t
    return t.to(torch.get_autocast_dtype(device))


def _flat(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # a slice may hold no logits


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def _tile(tile: Any) -> None:
    said = "tile must be two positive ints, tokens and vocabulary"
    if not isinstance(tile, (tuple, list)):
        raise TypeError(f"{said}; got {type(tile).__name__}")
    if len(tile) != 2 or not all(isinstance(n, int) and n > 0 for n in tile):
        raise ValueError(f"{said}; got {tile}")


def _alike(name: str, given: Tensor, hidden: Tensor) -> None:
    if given.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name} must have the tokens of hidden, {list(hidden.shape)}; got {list(given.shape)}"
        )
    _beside(name, given, "hidden", hidden)


def _head(prefix: str, hidden: Tensor, weight: object, bias: object, sliced: bool) -> None:
    """One side's tensors fit together."""
    ours, theirs = f"{prefix}hidden", f"{prefix}weight"
    validation.logits(ours, hidden, last=WIDTH)
    w = validation.tensor(theirs, weight)
    if w.dim() != 2 or w.shape[1] != hidden.shape[-1] or (w.shape[0] == 0 and not sliced):
        raise ValueError(
            f"{theirs} must have shape [V, H], H that of {ours}, which has shape "
            f"{list(hidden.shape)}; got {list(w.shape)}"
        )
    held = [(theirs, w)]
    if bias is not None:
        b = validation.tensor(f"{prefix}bias", bias)
        if b.shape != w.shape[:1]:
            raise ValueError(
                f"{prefix}bias must have shape [V] of {theirs}, which has shape {list(w.shape)}; "
                f"got {list(b.shape)}"
            )
        held.append((f"{prefix}bias", b))
    for name, t in held:
        if t.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of {ours}, {hidden.dtype} of shape "
                f"{list(hidden.shape)}; got {t.dtype} of shape {list(t.shape)}"
            )
        _beside(name, t, ours, hidden)


def _beside(name: str, t: Tensor, ours: str, hidden: Tensor) -> None:
    if t.device != hidden.device:
        raise ValueError(
            f"{name} must be on {hidden.device} as {ours}, which has shape {list(hidden.shape)}; "
            f"got {t.device}, shape {list(t.shape)}"
        )
