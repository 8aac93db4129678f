"""Scalar losses whose gradient is written in the forward sweep, and when that may be done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autograd import batched, call, composed_gradients, recorded
from .backends import BACKENDS
from .saving import hooked, keep, kept


class _ScalarLoss(torch.autograd.Function):
    """A reduced divergence whose gradient is written in the forward sweep.

    The row is still in cache there; backward multiplies by the scalar gradient, or does nothing
    where that is 1. The gradient made ahead serves one backward. Another one, one that is itself
    differentiated, and one whose factor would round a 16-bit gradient a second time go back to the
    logits, which the caller keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        policy: Tensor,
        reference_: Tensor,
        fields: tuple[str, ...],
        parameter: float | None,
        inv_temperature: Tensor | None,
        mask: Tensor | None,
        valid_vocab: int | None,
        softcap: float | None,
        share: Tensor,
        reduce: Callable[[Tensor], Tensor],
        backend: str,
    ) -> Tensor:
        grad = share.expand(len(fields), -1)
        values, state, ctx.ahead = call(
            "row_stats_with_gradient",
            grad,
            policy,
            reference_,
            fields,
            parameter,
            inv_temperature,
            mask,
            valid_vocab,
            softcap,
            backend,
        )
        keep(ctx, policy, reference_, inv_temperature, mask, state, share)
        ctx.fields = fields
        ctx.parameter, ctx.valid_vocab, ctx.softcap = parameter, valid_vocab, softcap
        ctx.backend = backend
        return reduce(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked first: it raises where the logits were changed since, as any backward does.
        policy, reference_, inv_temperature, mask, state, share = kept(ctx)
        ahead, ctx.ahead = ctx.ahead, None
        if recorded(policy, reference_, grads[0]):
            grad = (grads[0] * share).expand(len(ctx.fields), -1)
            gx, _ = composed_gradients(
                grad, policy, reference_, None, list(ctx.fields), inv_temperature, mask, ctx
            )
        elif ahead is not None and not batched(grads[0]) and _scales_exactly(ahead, grads[0]):
            call("scale_gradient_", ahead, grads[0], ctx.backend)
            gx = ahead
        else:
            del ahead  # before another one is allocated
            grad = torch.where(share != 0, grads[0] * share, 0).expand(len(ctx.fields), -1)
            gx, _ = call(
                "row_stats_backward",
                grad,
                policy,
                reference_,
                None,
                state,
                list(ctx.fields),
                ctx.parameter,
                inv_temperature,
                ctx.valid_vocab,
                ctx.softcap,
                True,
                False,
                ctx.backend,
            )
        return gx, None, None, None, None, None, None, None, None, None, None


def _scales_exactly(gradient: Tensor, factor: Tensor) -> bool:
    """Whether gradient * factor is right where it is 0, and rounds nothing that matters.

    On a GPU nobody looks: the host would wait for the device. The product is right there, rounded
    twice where the factor is neither 1 nor a power of two.
    """
    if gradient.device.type != "cpu":
        return True
    by = float(factor if gradient.dtype == torch.float64 else factor.float())  # as kernels have it
    if gradient.dtype != torch.bfloat16:  # digits to spare
        return math.isfinite(by)
    return abs(math.frexp(by)[0]) in (0.0, 0.5)


def gradient_ahead(policy: Tensor, reference_: Tensor, weight: Tensor | None, backend: str) -> bool:
    """Whether `scalar_loss` may stand for `row_stats` and a reduction.

    float16 gradients must be scaled before their only rounding, so they cannot be made ahead of
    the loss scale. A graph being traced or transformed takes the plain operators, and so does the
    reference backend, whose sweeps are not of the kind that gains. So does one under checkpointing,
    which would make this gradient twice and hold all of them.
    """
    if not BACKENDS[backend].gradient_ahead:
        return False
    if not torch.is_grad_enabled() or not policy.requires_grad or reference_.requires_grad:
        return False
    if policy.dtype == torch.float16 or (weight is not None and weight.requires_grad):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if hooked():
        return False
    return type(policy) in (Tensor, torch.nn.Parameter) and forward_ad._current_level < 0


def scalar_loss(
    policy: Tensor,
    reference_: Tensor,
    fields: tuple[str, ...],
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    share: Tensor,
    reduce: Callable[[Tensor], Tensor],
    *,
    valid_vocab: int | None,
    softcap: float | None,
    backend: str,
) -> Tensor:
    """reduce(row_stats(...)) with d reduce / d value = share [N] for every field."""
    out: Tensor = _ScalarLoss.apply(
        policy,
        reference_,
        fields,
        parameter,
        inv_temperature,
        mask,
        valid_vocab,
        softcap,
        share,
        reduce,
        backend,
    )
    return out
