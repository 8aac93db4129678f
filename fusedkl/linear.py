"""lm_head and divergence together: the logits never exist. See docs/linear.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import divergences, reductions, validation
from .layout import of_no_slice
from .linear_autograd import linear_stats
from .linear_inputs import inputs_of, per_token
from .linear_shards import shards_of
from .linear_topk import one_reference, teacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    kind: str = "forward_kl",
    *,
    ref_logits: Tensor | None = None,
    ref_topk: tuple[Tensor, Tensor] | None = None,
    tail: str | None = None,
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
    group: ProcessGroup | None = None,
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
        ref_logits: [..., V], instead of ref_hidden; any floating-point dtype; read in place if the
            leading dims are one in memory. A slice `logits[:, :-1]` of a batch is not, and copied:
            give all of it, hidden states as well, and mask the last tokens.
        ref_topk: instead of either, ids and log-probabilities, both [..., K], of the tokens that
            are known of the reference, as `topk_divergence` takes them; forward_kl and reverse_kl.
            Where nobody looks (a GPU, torch.compile) a row with an id of V or more is NaN.
        tail: "bucket" (None), "drop" or "renormalize", as for `topk_divergence`; with ref_topk.
        bias, ref_bias: [V], added to the products; -inf masks a vocabulary entry.
        softcap, ref_softcap: c > 0 of c tanh(logits / c), after the scale; None: not capped.
        logit_scale, ref_logit_scale: what the logits are multiplied by.
        temperature, mask, labels, ignore_index, reduction, backend: as for `divergence`, with
            hidden.shape[:-1] for logits.shape[:-1]. Tokens that do not count are dropped before
            the first product (on a GPU, where that would wait for the device, after it).
        token_weight: the `weight` of `divergence`.
        ce_weight: from 0 to 1: the result is (1 - ce_weight) times the divergence plus ce_weight
            times the cross-entropy of labels (int64, from 0 to V - 1 where they count) at
            temperature 1, from the same tiles. No T^2 factor. At 0 the labels only mask, at 1 the
            reference is not read.
        precision: None: tiles of float32 logits. "fast": tiles in the dtype of hidden, whose
            rounding is an error of the divergence; docs/linear.md shows its size. In bfloat16 on a
            CPU the gradients' products are rounded for each tile, too. On a CPU without 16-bit
            products, where they would be emulated and slower, the same as None.
        tile: tokens and vocabulary entries of a tile; None: chosen (`fusedkl.linear_plan`).
        group: a process group whose ranks each hold the rows of weight, ref_weight, bias, ref_bias
            and the columns of ref_logits of a slice of the vocabulary; hidden states are the same
            on every rank, and their gradients are summed over them. labels and ref_topk have ids of
            the whole vocabulary. No double backward. docs/sharding.md.

    Returns:
        shape hidden.shape[:-1], or a scalar; float32, or float64 for float64 inputs; nats.
        Gradients come in each input's dtype, accumulated in float32 and rounded once ("fast":
        see there).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2025, for a head whose
    logits never exist; for divergences of two heads: docs/linear.md.
    """
    fields, parameter = divergences.resolve(kind, beta, alpha)
    validation.reduction(reduction)
    one_reference(ref_topk, ref_hidden, ref_logits, ref_softcap, ref_logit_scale)
    if ref_topk is not None:
        fields = ("logsumexp",)  # of the tokens that the reference does not name
    shape = validation.tensor("hidden", hidden).shape[:-1]
    if reduction == "batchmean" and not shape:
        raise ValueError('reduction="batchmean" needs hidden with a batch dim; got shape [H]')
    others = ref_topk if isinstance(ref_topk, (tuple, list)) else (ref_hidden, ref_logits)
    inverse, counted, weights = per_token(
        hidden, temperature, mask, labels, ignore_index, token_weight, *others
    )
    inputs = inputs_of(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, ref_logits, fields, precision, tile,
        (logit_scale, ref_logit_scale), (softcap, ref_softcap), backend, group is not None,
    )._replace(
        parameter=parameter,
        inv_temperature=inverse,
        mask=reductions.rows_to_read(counted, weights),
    )  # fmt: skip
    # of slices, what the whole vocabulary has is looked at when the call is made
    width = None if group is not None else weight.shape[0]
    known = teacher(ref_topk, tail, kind, hidden, width, counted)
    if known is not None:
        inputs = inputs._replace(topk_ids=known.ids)
    if ce_weight is not None:
        hard = _hard(ce_weight, labels, counted, width)
        inputs = inputs._replace(labels=hard if ce_weight > 0 else None)
    if ce_weight == 1:  # the reference is not read
        known, fields = None, ()
        inputs = inputs._replace(
            fields=[], topk_ids=None, ref_hidden=None, ref_weight=None, ref_bias=None,
            ref_logits=None,
        )  # fmt: skip
    shards = None
    if group is not None:
        said = f"{kind} {parameter} {tail} {len(fields)}"
        shards = shards_of(group, inputs, f"linear_divergence {said}", temperature)
    values = linear_stats(inputs, shards)
    if known is not None:
        outcomes = values[: known.ids.shape[1] + 1]
        tokens = known.divergence(outcomes, inputs.mask, inputs.backend)
        values = values.to(known.dtype)
    else:
        tokens = values[: len(fields)].sum(0)
    if ce_weight is not None and ce_weight > 0:  # 0 times an infinite term is no number
        tokens = (1 - ce_weight) * tokens - ce_weight * values[-1]
    return reductions.reduce(tokens, counted, weights, reduction, shape, backend=inputs.backend)


def _hard(
    ce_weight: float, labels: Tensor | None, counted: Tensor | None, width: int | None
) -> Tensor:
    """The labels as [N], 0 where they do not count."""
    validation.share("ce_weight", ce_weight)
    if labels is None or labels.dtype != torch.int64:
        got = "None" if labels is None else labels.dtype
        raise TypeError(f"ce_weight needs labels, an int64 tensor; got {got}")
    assert counted is not None
    ids = torch.where(counted, labels.reshape(-1), 0)
    if width is not None:
        validation.token_range("labels", ids, width, ", or ignore_index")
    return of_no_slice(ids)
