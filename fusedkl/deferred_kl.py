"""The functions that `patch()` installs for torch's softmaxes, and kl_div of what they return."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autograd, kl_div_ops, scalar_loss
from .backends import needs, resolve
from .deferred import SPECIAL, Plan, plan_of, under_later_hooks
from .layout import rows

__all__ = ["SMALLEST", "fused_kl_div", "softmax_of"]

# Below this many logits a fused call gains less than its fixed cost.
SMALLEST = 1 << 14

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_HALF = (torch.bfloat16, torch.float16)
_FIELDS = ("forward_kl",)


@functools.lru_cache(maxsize=64)
def _result_dtype(
    compute: Callable[..., Tensor], given: torch.dtype, device: str, autocast: torch.dtype | None
) -> torch.dtype:
    """The dtype of compute(logits), as torch has it: autocast has a rule per device."""
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        return compute(torch.empty(1, dtype=given, device=device)).dtype


def _backend(*logits: Tensor) -> str:
    return resolve(None, logits[0].device, needs(*logits, *_FIELDS))


def _deferrable(x: Tensor, dim: int | None, dtype: torch.dtype | None) -> bool:
    return (
        dim is not None
        and not kl_div_ops.observed()
        and dim in (-1, x.dim() - 1)
        and x.dtype in _DTYPES
        # A narrower type rounds the logits first, and float64 asks for more than float32 logits
        # are read with.
        and (dtype is None or dtype == x.dtype or (dtype == torch.float32 and x.dtype in _HALF))
        and x.layout == torch.strided
        and not x.is_inference()
        and not torch.is_inference_mode_enabled()
        and _backend(x) != "reference"
    )


def softmax_of(name: str, x: Tensor, dim: int | None, dtype: torch.dtype | None) -> Tensor | None:
    """log_softmax or softmax of a plain tensor, deferred; None where torch's own must run."""
    if not _deferrable(x, dim, dtype):
        return None
    compute = _COMPUTE[name, dtype]
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    plan = Plan(name, compute, (x,), _result_dtype(compute, x.dtype, device, autocast))
    return plan.tensor()


def _computed(name: str, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    function = getattr(torch.ops.aten, name).int  # torch's own name for it may be replaced

    def compute(x: Tensor) -> Tensor:
        out: Tensor = function(x, -1, dtype)
        return out

    return compute


# One object for each, so that the cache of _result_dtype knows it.
_COMPUTE = {
    (name, dtype): _computed(name, dtype)
    for name in ("log_softmax", "softmax")
    for dtype in (None, *_DTYPES)
}


def fused_kl_div(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor | None:
    """F.kl_div of two deferred softmaxes, or None where torch's composition must run.

    "none" is deferred itself, and becomes one number per row if its last dim is summed.
    """
    p, q = plan_of(input), plan_of(target)
    if p is None or q is None or (log_target is not True and log_target is not False):
        return None
    if p.name != "log_softmax" or q.name != ("log_softmax" if log_target else "softmax"):
        return None
    given = p.logits + q.logits
    if len(given) != 2:  # another thread has used one of them since
        return None
    x, y = given
    if x.shape != y.shape or x.device != y.device or kl_div_ops.observed():
        return None
    if under_later_hooks(p, q):
        return None
    dtype = torch.promote_types(p.dtype, q.dtype)
    if dtype in _HALF and torch.is_autocast_enabled(x.device.type):
        dtype = torch.float32  # kl_div is on autocast's float32 list
    compute = functools.partial(torch.kl_div, reduction=0, log_target=log_target)
    plan = Plan("kl_div", compute, (x, y), dtype, (p, q))
    if reduction == "none":
        return plan.tensor()
    divisor = {"sum": 1, "mean": x.numel(), "batchmean": x.shape[0]}[reduction]
    return _total(plan, plan.sources(), divisor)


def _sources(plan: Plan, logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, str]:
    plan.check_unchanged()
    x, y = logits
    return rows(x), rows(y), _backend(x, y)


def _total(plan: Plan, logits: tuple[Tensor, ...], divisor: int) -> Tensor:
    x, y, backend = _sources(plan, logits)

    def reduced(values: Tensor) -> Tensor:
        return autograd.ordered_sum(values[0], None, backend=backend) / divisor

    if scalar_loss.gradient_ahead(x, y, None, backend):
        dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
        share = torch.full((math.prod(x.shape[:-1]),), 1 / divisor, dtype=dtype, device=x.device)
        total = scalar_loss.scalar_loss(
            x,
            y,
            _FIELDS,
            None,
            None,
            None,
            share,
            reduced,
            valid_vocab=None,
            softcap=None,
            backend=backend,
        )
    else:
        total = reduced(autograd.row_stats(x, y, None, _FIELDS, backend=backend))
    return total.to(plan.dtype)


def _sum(
    input: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    axis: Any = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    **other: Any,  # NumPy's names
) -> Any:
    plan = plan_of(input)
    if plan is None or plan.name != "kl_div" or dtype is not None or out is not None or other:
        return NotImplemented
    logits = plan.sources()
    if not logits or under_later_hooks(plan):  # none if another thread has used it since
        return NotImplemented
    dim = axis if dim is None else dim
    if dim is None:
        return NotImplemented if keepdim else _total(plan, logits, 1)
    shape = logits[0].shape
    last = len(shape) - 1
    if dim not in (-1, last, [-1], [last], (-1,), (last,)):
        return NotImplemented
    x, y, backend = _sources(plan, logits)
    values = autograd.row_stats(x, y, None, _FIELDS, backend=backend)[0]
    return values.view(shape[:-1] + (1,) * keepdim).to(plan.dtype)


SPECIAL[torch.sum] = SPECIAL[torch.Tensor.sum] = _sum
