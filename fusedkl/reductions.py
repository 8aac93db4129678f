"""Masks, weights and reductions of per-token numbers: their only home.

    none       w D, one per token          sum        sum(w D)
    mean       sum(w D) / sum(w)           batchmean  sum(w D) / size(0)

over counted tokens, w = 1 without a weight. A token that is not counted, or has weight 0,
contributes exactly 0 to value and gradient whatever its row holds. "mean" of nothing is 0 with a
connected graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, validation
from .saving import ordinary


def counted_tokens(
    policy: Tensor, mask: Tensor | None, labels: Tensor | None, ignore_index: int
) -> Tensor | None:
    """bool [N], True = counted, from mask and labels together; None if all are."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index must be an int; got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits; got {ignore_index}")
    counted = None
    if mask is not None:
        mask = validation.per_row("mask", mask, policy)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, True = counted; got {mask.dtype}")
        counted = mask
    if labels is not None:
        labels = validation.per_row("labels", labels, policy)
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be an integer tensor; got {labels.dtype}")
        labelled = (
            labels.long() != ignore_index
        )  # a narrow type would wrap the number that it is compared with
        counted = labelled if counted is None else counted & labelled
    elif ignore_index != -100:
        raise ValueError(f"ignore_index={ignore_index} has no effect without labels")
    return None if counted is None else ordinary(counted.reshape(-1).contiguous())


def token_weights(
    policy: Tensor, weight: Tensor | None, dtype: torch.dtype, name: str = "weight"
) -> Tensor | None:
    """The weight as [N] of the results' dtype."""
    if weight is None:
        return None
    weight = validation.per_row(name, weight, policy)
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {weight.dtype}")
    return ordinary(weight.reshape(-1).to(dtype))


def rows_to_read(counted: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """The mask for kernels: rows of weight 0 need not be read, unless weight wants a gradient."""
    if weight is None or weight.requires_grad:
        return counted
    weighty = weight != 0
    return weighty if counted is None else counted & weighty


def reduce(
    values: Tensor,
    counted: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    shape: torch.Size,
    *,
    backend: str,
) -> Tensor:
    """Per-token values [N], exactly 0 where not counted, to `shape` or to a scalar."""
    weight = _counted_only(weight, counted)
    if weight is not None:
        # Keeps the gradient to a weight of 0, and keeps 0 * inf out of the result.
        values = torch.where((weight != 0) | values.isfinite(), values, 0)
    if reduction == "none":
        values = values if weight is None else values * weight
        return values if values.shape == shape else values.reshape(shape)
    total = autograd.ordered_sum(values, weight, backend=backend)
    by = _divisor(values.shape[0], counted, weight, reduction, shape, backend)
    return total if by is None else total / by


def shares(
    values: int,
    counted: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    shape: torch.Size,
    like: Tensor,
    dtype: torch.dtype,
    *,
    backend: str,
) -> Tensor:
    """d reduce / d value [N] for a scalar reduction, rounded as its derivative would be."""
    weight = _counted_only(weight, counted)
    by = _divisor(values, counted, weight, reduction, shape, backend)
    share = like.new_ones(1, dtype=dtype)
    if by is not None:
        share = share / by
    if weight is not None:  # a divisor of 0 or NaN must not reach what does not count
        share = torch.where(weight != 0, share * weight, 0)
    elif counted is not None:
        share = torch.where(counted, share, 0)
    return share.expand(values).contiguous()


def _counted_only(weight: Tensor | None, counted: Tensor | None) -> Tensor | None:
    if weight is None or counted is None:
        return weight
    return torch.where(counted, weight, 0)


def _divisor(
    values: int,
    counted: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    shape: torch.Size,
    backend: str,
) -> Tensor | int | None:
    """What a scalar reduction divides the sum of `values` numbers by; None where it does not."""
    if reduction == "sum":
        return None
    if reduction == "batchmean":
        return max(shape[0], 1)
    if weight is not None:
        norm = autograd.ordered_sum(weight, None, backend=backend)
        return torch.where((weight != 0).any(), norm, 1)
    if counted is not None:
        return counted.sum().clamp(min=1)
    return max(values, 1)
