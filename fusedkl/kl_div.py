"""`kl_div` and `KLDivLoss`: torch.nn.functional.kl_div and torch.nn.KLDivLoss, drop-in.

Usual inputs (`_fusable` lists what that means) run in one sweep over memory forward and one
backward. Everything else, and all that looks at the operations themselves (torch.compile, export,
tracing, functorch, forward AD, double backward, tensor subclasses, modes), gets torch's own
composition.
"""

# No postponed annotations here: torch.jit.script reads them, and inspect.signature equals torch's.
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .backends import from_environment
from .deferred import SPECIAL, Deferred, result
from .deferred_kl import fused_kl_div
from .kl_div_ops import HAS_CPU_KERNEL, kl_div_sum, observed

__all__ = ["KLDivLoss", "kl_div"]

# Taken once: patch() replaces the attribute, and what is not fused must still reach torch.
_TORCH_KL_DIV = F.kl_div

_MEAN_WARNING = (
    "reduction: 'mean' divides the total loss by both the batch size and the support size."
    "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
    "'mean' will be changed to behave the same as 'batchmean' in the next major release."
)
_REDUCTION = {"mean": 1, "sum": 2, "batchmean": 2}  # at::Reduction

# Fewer elements than this are torch's; not 0 while patch() is active.
_least = 0

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def fuse_from(elements: int) -> None:
    """Leave `kl_div` of fewer elements to torch, so that small ones cost no more than before."""
    global _least
    _least = elements


def _fusable(input: Tensor, target: Tensor) -> bool:
    """Whether the compiled kernel does what torch does with these.

    FUSEDKL_BACKEND naming another backend than "cpu" asks for torch.
    An inference tensor cannot be saved for backward; torch saves other things and may not have to.
    """
    return (
        HAS_CPU_KERNEL
        and type(input) in _PLAIN
        and type(target) in _PLAIN
        and input.is_cpu
        and target.is_cpu
        and input.dtype == target.dtype
        and input.dtype in _DTYPES
        and not observed()  # before all that a tracer would warn of
        and input.numel() >= _least
        and input.layout == torch.strided
        and target.layout == torch.strided
        and input.shape == target.shape
        and not (torch.is_grad_enabled() and (input.is_inference() or target.is_inference()))
        and input.is_contiguous()  # the layout of torch's gradients to others is no simple rule
        and target.is_contiguous()
        and from_environment() in (None, "cpu")
    )


def _fused(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    if input.dtype in _HALF and torch.is_autocast_enabled("cpu"):
        input, target = input.float(), target.float()  # kl_div is on torch's float32 list
    divisor = 1
    if reduction == "mean":
        divisor = input.numel()
    elif reduction == "batchmean" and input.dim() != 0:
        divisor = input.shape[0]
    return kl_div_sum(input, target, log_target, float(divisor))


def _eager(
    input: Tensor,
    target: Tensor,
    size_average: bool | None,
    reduce: bool | None,
    reduction: str,
    log_target: bool,
) -> Tensor:
    if torch.compiler.is_compiling():
        # One node of the graph, which inductor fuses with the log_softmax before it; an operator
        # of ours would have the probabilities written out first.
        return _TORCH_KL_DIV(input, target, size_average, reduce, reduction, log_target)
    if type(input) is Deferred or type(target) is Deferred:
        return _of_deferred(input, target, size_average, reduce, reduction, log_target)
    if has_torch_function_variadic(input, target):
        # torch's function, not ours: implementations of __torch_function__ look it up in tables.
        overridden: Tensor = handle_torch_function(
            _TORCH_KL_DIV,
            (input, target),
            input,
            target,
            size_average=size_average,
            reduce=reduce,
            reduction=reduction,
            log_target=log_target,
        )
        return overridden
    legacy = size_average is not None or reduce is not None
    if legacy or reduction not in ("mean", "batchmean", "sum"):
        return _TORCH_KL_DIV(input, target, size_average, reduce, reduction, log_target)
    if reduction == "mean":
        warnings.warn(_MEAN_WARNING, stacklevel=3)
    return _reduced(input, target, reduction, log_target)


def _reduced(input: Tensor, target: Tensor, reduction: str, log_target: bool) -> Tensor:
    if (log_target is True or log_target is False) and _fusable(input, target):
        return _fused(input, target, reduction, log_target)
    # Not torch's function: its warning, given above, would name this line instead of the caller's.
    reduced = torch.kl_div(input, target, _REDUCTION[reduction], log_target=log_target)
    if reduction == "batchmean" and input.dim() != 0:
        reduced = reduced / input.size()[0]
    return reduced


def _of_deferred(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """kl_div of what `patch()` deferred, called by us or by torch's own kl_div."""
    legacy = size_average is not None or reduce is not None
    if not legacy and reduction in ("mean", "batchmean", "sum", "none"):
        if reduction == "mean":
            warnings.warn(_MEAN_WARNING, stacklevel=_callers_level())
        fused = fused_kl_div(input, target, reduction, log_target)
        if fused is not None:
            return fused
        if reduction != "none" and type(result(input)) in _PLAIN and type(result(target)) in _PLAIN:
            return _reduced(result(input), result(target), reduction, log_target)
    return _TORCH_KL_DIV(result(input), result(target), size_average, reduce, reduction, log_target)


def _callers_level() -> int:
    """The stacklevel, where this is called, of the first frame outside of torch and fusedkl."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in ("torch", "fusedkl"):
            break
        level, frame = level + 1, frame.f_back
    return level


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """torch.nn.functional.kl_div, in one sweep over memory for usual inputs.

        log_target=False:  target (log target - input), 0 log 0 = 0      summed as `reduction` says
        log_target=True:   exp(target) (target - input)

    Args:
        input: log-probabilities, any shape, any floating dtype.
        target: probabilities, or log-probabilities with `log_target=True`; broadcast against input.
        size_average, reduce: torch's deprecated flags.
        reduction: "none", "sum", "batchmean" (sum / input.size(0)) or "mean" (over *elements*: V
            times smaller than the mean KL of rows of V; warns, as torch does).
        log_target: whether target is in log space.

    Returns nats, with the dtype, shape, layout, gradients (to both), warnings and errors of torch's
    function. What may differ: the last bits of sums, whose order is ours and the same for any
    number of threads; in bfloat16 and float16 all arithmetic is float32 with one rounding at the
    end; and backward keeps the tensors themselves, so that overwriting one before backward is an
    error also where torch happens to keep a copy.

    Equivalent: `torch.nn.functional.kl_div` with the same arguments.
    Errors: torch's. Source: the formulas in torch's documentation of KLDivLoss.
    """
    if not torch.jit.is_scripting():
        return _eager(input, target, size_average, reduce, reduction, log_target)
    return _TORCH_KL_DIV(input, target, size_average, reduce, reduction, log_target)


SPECIAL[_TORCH_KL_DIV] = SPECIAL[kl_div] = _of_deferred


class KLDivLoss(torch.nn.KLDivLoss):
    """torch.nn.KLDivLoss over this package's `kl_div`: same arguments, attributes and results.

    Equivalent: `torch.nn.KLDivLoss(size_average, reduce, reduction, log_target)`. See `kl_div` for
    shapes, dtypes and errors.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)
