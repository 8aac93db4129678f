"""What tensors hold, where that can be looked at without waiting for a device."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

# "1": what cannot be looked at is asserted by the device itself, later and without a name.
ENVIRONMENT = "FUSEDKL_CHECK"


def temperatures(inverse: Tensor, mask: Tensor | None) -> None:
    """1/T on the CPU, one or one per row, where they are read."""
    counted = inverse
    if mask is not None and counted.shape == mask.shape:
        counted = counted[mask]
    valid = _positive(counted)
    if not bool(valid.all()):
        wrong = 1 / counted[~valid][0].item() if counted[~valid][0] != 0 else math.inf
        raise ValueError(f"temperature must be positive and finite; got {wrong}")


def row_stats(
    policy: Tensor,
    token_ids: Tensor | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
) -> None:
    """Temperatures, and ids within the vocabulary, of rows that count: arguments of row_stats."""
    last = (policy.shape[-1] if valid_vocab is None else valid_vocab) - 1
    if policy.device.type != "cpu":
        if os.environ.get(ENVIRONMENT) == "1":
            _assert_on_device(last, token_ids, inv_temperature, mask)
        return
    if inv_temperature is not None:
        temperatures(inv_temperature, mask)
    if token_ids is not None and token_ids.numel() > 0:
        ids = token_ids if mask is None else token_ids[mask]
        low, high = (int(v) for v in ids.aminmax()) if ids.numel() > 0 else (0, 0)
        if low < -1 or high > last:
            # users' negative ids arrive one lower: see layout.token_ids
            low, high = (v + 1 if v < -1 else v for v in (low, high))
            raise ValueError(
                f"index or token_ids must hold ids from 0 to {last}; got {low} to {high}"
            )


def _positive(inverse: Tensor) -> Tensor:
    return (inverse > 0) & (inverse < math.inf)


def _assert_on_device(
    last: int, token_ids: Tensor | None, inv_temperature: Tensor | None, mask: Tensor | None
) -> None:
    if inv_temperature is not None:
        valid = _positive(inv_temperature)
        valid = valid if mask is None or valid.shape != mask.shape else valid | ~mask
        torch._assert_async(valid.all(), "fusedkl: a temperature is not positive and finite")
    if token_ids is not None:
        within = (token_ids >= -1) & (token_ids <= last)
        within = within if mask is None else within | ~mask[:, None]
        torch._assert_async(within.all(), f"fusedkl: a token id is not from 0 to {last}")
