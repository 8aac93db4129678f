"""What operators take, from what users give: rows of logits and 1/T, without a copy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import reference, validation

# Elements of a block of rows: 16 MiB a temporary in float64. A row's numbers do not depend on it.
_BLOCK = 2**21
# On a device: 256 MiB in float32, so that some hundred rows are in flight at once.
_DEVICE_BLOCK = 2**26


def blocks(rows_: int, width: int, size: int = _BLOCK) -> Iterator[slice]:
    """The rows of a [rows_, width] tensor in parts; one empty part where there are none."""
    step = max(1, size // width)
    for at in range(0, max(rows_, 1), step):
        yield slice(at, min(at + step, rows_))


# Kernels take up to this many dims as they are strided.
_MAX_DIMS = 8


def dense(t: Tensor) -> Tensor:
    """The tensor, or a copy of it, whose last dim has stride 1."""
    if t.stride(-1) == 1 or t.shape[-1] <= 1:
        return t
    # Not contiguous(), which leaves an empty tensor its strides, whatever they are.
    return t.clone(memory_format=torch.contiguous_format)


def rows(logits: Tensor) -> Tensor:
    """[..., V] as the operators take it: no copy, unless the last dim has a stride."""
    if logits.dim() == 1:
        logits = logits.unsqueeze(0)
    logits = dense(logits)
    return logits.flatten(0, -2) if logits.dim() > _MAX_DIMS else logits


def row_parts(*tensors: Tensor) -> Iterator[Any]:
    """(slice of the row numbers, each tensor's rows) by blocks, for tensors of equal leading dims.

    Leading dims one by one, since a reshape may copy them.
    """
    first = tensors[0]
    if first.dim() > 2:
        try:  # one leading dim in truth
            tensors = tuple(t.view(-1, t.shape[-1]) for t in tensors)
            first = tensors[0]
        except RuntimeError:
            pass
    if first.dim() == 2:
        size = _BLOCK if first.device.type == "cpu" else _DEVICE_BLOCK
        for part in blocks(first.shape[0], first.shape[1], size):
            yield (part, *(t[part] for t in tensors))
        return
    inner = first[0].numel() // first.shape[-1] if first.shape[0] else 0
    for i in range(first.shape[0]):
        for part, *cut in row_parts(*(t[i] for t in tensors)):
            yield (slice(i * inner + part.start, i * inner + part.stop), *cut)


def positive_or_nan(t: Tensor) -> Tensor:
    """Temperatures on a device, where nobody looks at them: a bad one makes its row NaN."""
    return torch.where((t > 0) & (t < math.inf), t, torch.nan)


def inverse_temperature(
    temperature: float | Tensor, policy: Tensor, logit_scale: float = 1.0
) -> Tensor | None:
    """logit_scale/T as [N] or [1], None for 1: kernels scale differences of logits."""
    if isinstance(temperature, Tensor):
        validation.tensor_temperature(temperature, policy)
        t = temperature.reshape(-1).to(reference.inside(policy.device))
        return logit_scale / (t if policy.device.type == "cpu" else positive_or_nan(t))
    temperature = validation.number_temperature(temperature)
    if temperature == logit_scale:
        return None
    dtype = reference.inside(policy.device)
    return torch.full((1,), logit_scale / temperature, dtype=dtype, device=policy.device)


def token_ids(ids: Tensor, logits: Tensor) -> Tensor:
    """[...] or [..., K] as the operators take it, [N, K]."""
    per_row = ids.shape[-1] if ids.dim() == logits.dim() else 1
    return of_no_slice(ids.reshape(math.prod(logits.shape[:-1]), per_row).contiguous())


def of_no_slice(ids: Tensor) -> Tensor:
    """To operators -1 is a token of another slice; to users it is none, so it goes one lower."""
    return ids - (ids < 0).to(ids.dtype)
