"""What operators take, from what users give: rows of logits and 1/T, without a copy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference, validation

# Kernels take up to this many dims as they are strided.
_MAX_DIMS = 8


def rows(logits: Tensor) -> Tensor:
    """[..., V] as the operators take it: no copy, unless the last dim has a stride."""
    if logits.dim() == 1:
        logits = logits.unsqueeze(0)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    return logits.flatten(0, -2) if logits.dim() > _MAX_DIMS else logits


def inverse_temperature(
    temperature: float | Tensor, policy: Tensor, logit_scale: float = 1.0
) -> Tensor | None:
    """logit_scale/T as [N] or [1], None for 1: kernels scale differences of logits."""
    dtype = reference.inside(policy.device)
    if isinstance(temperature, Tensor):
        validation.tensor_temperature(temperature, policy)
        return logit_scale / temperature.reshape(-1).to(dtype)
    validation.number_temperature(temperature)
    if temperature == logit_scale:
        return None
    return torch.full((1,), logit_scale / temperature, dtype=dtype, device=policy.device)


def token_ids(ids: Tensor, logits: Tensor) -> Tensor:
    """[...] or [..., K] as the operators take it, [N, K].

    To operators -1 is a token of another slice; to users it is none, so it goes one lower.
    """
    per_row = ids.shape[-1] if ids.dim() == logits.dim() else 1
    flat = ids.reshape(math.prod(logits.shape[:-1]), per_row).contiguous()
    return flat - (flat < 0).to(flat.dtype)
