"""lm_head and token statistics together: the logits never exist. See docs/linear.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import divergences, reductions, validation
from .layout import of_no_slice
from .linear_autograd import linear_stats
from .linear_inputs import inputs_of, per_token
from .linear_shards import shards_of
from .stats import TokenStats, packed, wanted_fields

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    fields: Sequence[str] | None = None,
    ref_logits: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    precision: str | None = None,
    tile: tuple[int, int] | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats` of language-model heads, from hidden states; no logits in memory.

    Equivalent to, in float32 but for the rounding of 16-bit gradients::

        token_stats(hidden.float() @ weight.float().t(),
                    ref_hidden.float() @ ref_weight.float().t(), token_ids, fields=fields)

    Args:
        hidden, weight, ref_hidden, ref_weight, ref_logits, bias, ref_bias, softcap, ref_softcap,
            logit_scale, ref_logit_scale, temperature, mask, precision, tile, group, backend: as for
            `linear_divergence`; without ref_hidden and ref_logits the policy's half.
        token_ids: int64, shape hidden.shape[:-1] or that and one dim K more, from 0 to V - 1; over
            a group those of the whole vocabulary.
        fields: as for `token_stats`.

    Returns:
        TokenStats of shape hidden.shape[:-1] (token_ids.shape), nats; float32, or float64 for
        float64 inputs.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2025, for a head whose
    logits never exist.
    """
    validation.tensor("hidden", hidden)
    paired = ref_hidden is not None or ref_logits is not None
    wanted = wanted_fields(fields, paired, token_ids is not None)
    if not any(divergences.FIELDS[name].needs_reference for name in wanted):
        ref_hidden = ref_weight = ref_bias = ref_logits = None
    inverse, counted, _ = per_token(hidden, temperature, mask, None, -100, None)
    inputs = inputs_of(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, ref_logits, wanted, precision, tile,
        (logit_scale, ref_logit_scale), (softcap, ref_softcap), backend, group is not None,
    )._replace(
        inv_temperature=inverse,
        mask=reductions.rows_to_read(counted, None),
    )  # fmt: skip
    if any(divergences.FIELDS[name].needs_token_ids for name in wanted):
        assert token_ids is not None
        validation.token_index("token_ids", token_ids, hidden)
        per_row = token_ids.shape[-1] if token_ids.dim() == hidden.dim() else 1
        ids = token_ids.reshape(inputs.hidden.shape[0], per_row)
        if counted is not None:
            ids = torch.where(counted[:, None], ids, 0)
        if group is None:
            validation.token_range("token_ids", ids, weight.shape[0])
        inputs = inputs._replace(token_ids=of_no_slice(ids))
    shards = None
    if group is not None:
        kind = f"linear_token_stats {' '.join(wanted)}"
        shards = shards_of(group, inputs, kind, temperature)
    return packed(linear_stats(inputs, shards), wanted, token_ids, hidden)
