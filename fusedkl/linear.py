"""lm_head and divergence together: the logits never exist. See docs/linear.md."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from . import divergences, reductions, validation
from .backends import needs, resolve
from .layout import inverse_temperature
from .linear_autograd import linear_stats
from .linear_ops import Inputs

PRECISIONS = (None, "fast")


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    kind: str = "forward_kl",
    *,
    ref_logits: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    beta: float | None = None,
    alpha: float | None = None,
    ce_weight: float | None = None,
    reduction: str = "none",
    precision: str | None = None,
    tile: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divergence of two language-model heads, from hidden states; no logits in memory.

    With policy logits x and reference logits y, a tile of which exists at a time::

        x = softcap tanh(logit_scale (hidden weight^T + bias) / softcap)
        y = the same of ref_hidden, ref_weight, ref_bias, or ref_logits

    Equivalent to, in float32 but for the rounding of 16-bit gradients::

        divergence(hidden.float() @ weight.float().t(), ref_hidden.float() @ ref_weight.float().t(),
                   kind, temperature=temperature, mask=mask, reduction=reduction)

    Args:
        hidden: [..., H], the policy's last hidden states, after the final norm; float32, bfloat16,
            float16 or float64; any strides. Differentiable, as are all other floating-point
            arguments but temperature.
        weight: [V, H] of the dtype of hidden (under autocast both are cast to its dtype).
        ref_hidden: [..., H'], the reference's; the leading dims are those of hidden.
        ref_weight: [V, H'] of the dtype of ref_hidden; None: `weight` serves both.
        kind, beta, alpha: a divergence and its parameter, see `divergence`. Those of a second sweep
            (all but forward_kl, reverse_kl and jeffreys) make every tile of logits twice forward.
        ref_logits: [..., V], instead of ref_hidden; any floating-point dtype, read in place.
        bias, ref_bias: [V], added to the products; -inf masks a vocabulary entry.
        softcap, ref_softcap: c > 0 of c tanh(logits / c), after the scale; None: not capped.
        logit_scale, ref_logit_scale: what the logits are multiplied by.
        temperature, mask, labels, ignore_index, reduction, backend: as for `divergence`, with
            hidden.shape[:-1] for logits.shape[:-1]. Tokens that do not count are dropped before
            the first product (on a GPU, where that would wait for the device, after it).
        token_weight: the `weight` of `divergence`.
        ce_weight: from 0 to 1: the result is (1 - ce_weight) times the divergence plus ce_weight
            times the cross-entropy of labels (int64, from 0 to V - 1 where they count) at
            temperature 1, from the same tiles. No T^2 factor.
        precision: None: tiles of float32 logits. "fast": tiles in the dtype of hidden, whose
            rounding is an error of the divergence; docs/linear.md shows its size.
        tile: tokens and vocabulary entries of a tile; None: chosen (`fusedkl.linear_plan`).

    Returns:
        shape hidden.shape[:-1], or a scalar; float32, or float64 for float64 inputs; nats.
        Gradients come in each input's dtype, accumulated in float32 and rounded once.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2025, for a head whose
    logits never exist; for divergences of two heads: docs/linear.md.
    """
    fields, parameter = divergences.resolve(kind, beta, alpha)
    validation.reduction(reduction)
    if ref_hidden is None and ref_logits is None:
        raise ValueError("a reference is needed: ref_hidden (with ref_weight), or ref_logits")
    shape = validation.tensor("hidden", hidden).shape[:-1]
    if reduction == "batchmean" and not shape:
        raise ValueError('reduction="batchmean" needs hidden with a batch dim; got shape [H]')
    inverse, counted, weights = per_token(
        hidden, temperature, mask, labels, ignore_index, token_weight
    )
    inputs = inputs_of(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, ref_logits, fields, precision, tile,
        (logit_scale, ref_logit_scale), (softcap, ref_softcap), backend,
    )._replace(
        parameter=parameter,
        inv_temperature=inverse,
        mask=reductions.rows_to_read(counted, weights),
    )  # fmt: skip
    if ce_weight is not None:
        inputs = inputs._replace(labels=_hard(ce_weight, labels, counted, hidden, weight))
    values = linear_stats(inputs)
    tokens = values[0]
    for i in range(1, len(fields)):
        tokens = tokens + values[i]
    if ce_weight is not None:
        tokens = (1 - ce_weight) * tokens - ce_weight * values[-1]
    return reductions.reduce(tokens, counted, weights, reduction, shape, backend=inputs.backend)


def _hard(
    ce_weight: float, labels: Tensor | None, counted: Tensor | None, hidden: Tensor, weight: Tensor
) -> Tensor:
    """The labels as [N], 0 where they do not count."""
    validation.share("ce_weight", ce_weight)
    if labels is None or labels.dtype != torch.int64:
        got = "None" if labels is None else labels.dtype
        raise TypeError(f"ce_weight needs labels, an int64 tensor; got {got}")
    assert counted is not None
    ids = torch.where(counted, labels.reshape(-1), 0)
    validation.token_range("labels", ids, weight.shape[0], ", or ignore_index")
    return ids


def per_token(
    hidden: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """1/T, what counts, and weights, as [N]."""
    inverse = inverse_temperature(temperature, hidden)
    counted = reductions.counted_tokens(hidden, mask, labels, ignore_index)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return inverse, counted, reductions.token_weights(hidden, weight, dtype)


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
) -> Inputs:
    """The two heads, checked, with tokens flattened."""
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be None or "fast"; got {precision!r}')
    for name, value in zip(("logit_scale", "ref_logit_scale"), scales, strict=True):
        _number(name, value)
    for name, cap in zip(("softcap", "ref_softcap"), softcaps, strict=True):
        if cap is not None:
            _number(name, cap)
            if not cap > 0:
                raise ValueError(f"{name} must be positive; got {cap}")
    if tile is not None and not (
        len(tile) == 2 and all(isinstance(n, int) and n > 0 for n in tile)
    ):
        raise ValueError(f"tile must be two positive ints, tokens and vocabulary; got {tile}")
    if ref_weight is weight:
        ref_weight = None
    hidden, weight = _autocast(hidden), _autocast(weight)
    bias, ref_bias = _autocast(bias), _autocast(ref_bias)
    ref_hidden, ref_weight = _autocast(ref_hidden), _autocast(ref_weight)
    _head("", hidden, weight, bias)
    if ref_hidden is not None:
        if ref_logits is not None:
            raise ValueError(
                "one form of reference is accepted; got ref_hidden of shape "
                f"{list(ref_hidden.shape)} and ref_logits of shape {list(ref_logits.shape)}"
            )
        _head("ref_", ref_hidden, weight if ref_weight is None else ref_weight, ref_bias)
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
        validation.logits("ref_logits", ref_logits)
        _alike("ref_logits", ref_logits, hidden)
        if ref_logits.shape[-1] != weight.shape[0]:
            raise ValueError(
                f"ref_logits must have weight's vocabulary, {list(weight.shape)}; "
                f"got {list(ref_logits.shape)}"
            )
        if ref_logits.stride(-1) != 1 and ref_logits.shape[-1] > 1:
            ref_logits = ref_logits.contiguous()
    return Inputs(
        _flat(hidden), weight, bias, None if ref_hidden is None else _flat(ref_hidden), ref_weight,
        ref_bias, None if ref_logits is None else _flat(ref_logits), None, None, list(fields), None,
        None, None, [float(s) for s in scales], [float(c or 0) for c in softcaps],
        precision == "fast", [] if tile is None else list(tile),
        resolve(backend, hidden.device, needs(*fields)),
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
    return t.reshape(-1, t.shape[-1])


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")


def _alike(name: str, given: Tensor, hidden: Tensor) -> None:
    if given.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name} must have the tokens of hidden, {list(hidden.shape)}; got {list(given.shape)}"
        )
    if given.device != hidden.device:
        raise ValueError(f"{name} must be on {hidden.device} as hidden; got {given.device}")


def _head(prefix: str, hidden: Tensor, weight: object, bias: object) -> None:
    """One side's tensors fit together."""
    ours, theirs = f"{prefix}hidden", f"{prefix}weight"
    validation.logits(ours, hidden)
    w = validation.tensor(theirs, weight)
    if w.dim() != 2 or w.shape[1] != hidden.shape[-1] or w.shape[0] == 0:
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
            raise TypeError(f"{name} must have the dtype of {ours}, {hidden.dtype}; got {t.dtype}")
        if t.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} as {ours}; got {t.device}")
