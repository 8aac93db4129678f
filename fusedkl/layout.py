"""What operators take, from what users give: rows of logits and 1/T, without a copy."""

from __future__ import annotations

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


def inverse_temperature(temperature: float | Tensor, policy: Tensor) -> Tensor | None:
    """1/T as [N] or [1], None for T = 1: kernels scale differences of logits, never logits."""
    dtype = reference.inside(policy.device)
    if isinstance(temperature, Tensor):
        validation.tensor_temperature(temperature, policy)
        return temperature.reshape(-1).to(dtype).reciprocal()
    validation.number_temperature(temperature)
    if temperature == 1:
        return None
    return torch.full((1,), 1 / temperature, dtype=dtype, device=policy.device)
