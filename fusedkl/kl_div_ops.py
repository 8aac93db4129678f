"""The operators behind `kl_div`, and their derivatives.

fusedkl::kl_div_sum(input, target, log_target, divisor) -> 0-d, sum of the elements / divisor
    input, target  contiguous, of one shape and dtype (float32, bfloat16, float16 or float64)
fusedkl::kl_div_backward(grad 0-d, input?, target, log_target, divisor, input_grad, target_grad)
    -> (gradient to input, gradient to target), contiguous; one that was not asked for has shape
       [0]; input may be None where the gradient to target is not asked for

The compiled library has CPU kernels for both; the compositions below serve where it has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._library import LIB, NAMESPACE, TAGS, has_kernel

__all__ = ["HAS_CPU_KERNEL", "composed_gradients", "kl_div_sum", "observed"]

_SUM = 2  # at::Reduction::Sum


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _composed_sum(input: Tensor, target: Tensor, log_target: bool, divisor: float) -> Tensor:
    total = torch.kl_div(_wide(input), _wide(target), _SUM, log_target=log_target)
    return (total / divisor).to(input.dtype)


def composed_gradients(
    grad: Tensor,
    input: Tensor | None,
    target: Tensor,
    log_target: bool,
    divisor: float,
    input_grad: bool,
    target_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients (to input, to target) in differentiable torch operations.

    Term by term what torch's autograd computes, `g * t / t` included, so that the same points are
    NaN here and in every derivative of this.
    """
    g, t = _wide(grad) / divisor, _wide(target)
    weight = t.exp() if log_target else t
    to_input = (-g * weight).to(target.dtype) if input_grad else None
    to_target = None
    if target_grad:
        assert input is not None
        x = _wide(input)
        if log_target:
            to_target = g * (t - x) * weight + g * weight
        else:
            to_target = torch.xlogy(g, t) + g * t / t - g * x
        to_target = to_target.to(target.dtype)
    return to_input, to_target


def _composed_backward(
    grad: Tensor, input: Tensor | None, target: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    found = composed_gradients(grad, input, target, *options)
    to_input, to_target = (target.new_empty(0) if g is None else g for g in found)
    return to_input, to_target


def _fake_sum(input: Tensor, target: Tensor, log_target: bool, divisor: float) -> Tensor:
    return input.new_empty(())


def _fake_backward(
    grad: Tensor,
    input: Tensor | None,
    target: Tensor,
    log_target: bool,
    divisor: float,
    input_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, Tensor]:
    to_input, to_target = (
        target.new_empty(target.shape if wanted else (0,)) for wanted in (input_grad, target_grad)
    )
    return to_input, to_target


for _name, _signature, _composed, _fake in (
    (
        "kl_div_sum",
        "(Tensor input, Tensor target, bool log_target, float divisor) -> Tensor",
        _composed_sum,
        _fake_sum,
    ),
    (
        "kl_div_backward",
        "(Tensor grad, Tensor? input, Tensor target, bool log_target, float divisor, "
        "bool input_grad, bool target_grad) -> (Tensor, Tensor)",
        _composed_backward,
        _fake_backward,
    ),
):
    LIB.define(_name + _signature, tags=TAGS)
    LIB.impl(_name, _composed, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIB)

_OP_SUM = torch.ops.fusedkl.kl_div_sum.default
_OP_BACKWARD = torch.ops.fusedkl.kl_div_backward.default
HAS_CPU_KERNEL = has_kernel("kl_div_sum", "CPU") and has_kernel("kl_div_backward", "CPU")


def observed() -> bool:
    """Whether something records, transforms or differentiates the operations that run now.

    Private names of torch; tests/test_kl_div.py fails where one of them changes its meaning.
    """
    return (
        torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


class _KLDivSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, log_target: bool, divisor: float
    ) -> Tensor:
        # As torch does: the gradient to input does not depend on input, so it is not kept for it.
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, target)
        ctx.options = (log_target, divisor)
        ctx.set_materialize_grads(False)
        out: Tensor = _OP_SUM(input, target, log_target, divisor)
        return out

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad = grads[0]
        if grad is None:
            return None, None, None, None
        input, target = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        recorded = torch.is_grad_enabled() or torch.compiler.is_compiling() or observed()
        if recorded or type(grad) is not torch.Tensor:
            both = composed_gradients(grad, input, target, *ctx.options, *wanted)
        else:
            both = _OP_BACKWARD(grad, input, target, *ctx.options, *wanted)
        return both[0] if wanted[0] else None, both[1] if wanted[1] else None, None, None


def kl_div_sum(input: Tensor, target: Tensor, log_target: bool, divisor: float) -> Tensor:
    """Operator kl_div_sum, differentiable in both any number of times."""
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        applied: Tensor = _KLDivSum.apply(input, target, log_target, divisor)
        return applied
    out: Tensor = _OP_SUM(input, target, log_target, divisor)
    return out
