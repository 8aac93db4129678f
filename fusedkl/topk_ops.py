"""The operators behind `topk_divergence`: a row as K given tokens and all others together.

fusedkl::topk_logprobs(policy, token_ids, inv_temperature?, mask?, backend)
    policy     [..., V], as row_stats takes it (fusedkl/ops.py); N rows
    token_ids  int64 [N, K], different ones in a row; negative: padding
    -> values [N, K + 1]  float64: log p of each token (padding: 0), and log of what is left of p
       state  [N, S]      what the backend's own backward remembers
fusedkl::topk_logprobs_backward(grad [N, K + 1], policy, token_ids, state, inv_temperature?,
                                backend) -> gradient to the policy, contiguous, in its dtype

The reference backend composes it from torch, the others read each row once in either.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import reference, reference_backend
from ._library import LIB, NAMESPACE, TAGS
from .autograd import front, per_row, recorded
from .backends import kernels
from .forward_mode import applied
from .saving import keep, kept

ARGUMENTS = {
    "topk_logprobs": (
        "Tensor policy, Tensor token_ids, Tensor? inv_temperature, Tensor? mask",
        "(Tensor values, Tensor state)",
    ),
    "topk_logprobs_backward": (
        "Tensor grad, Tensor policy, Tensor token_ids, Tensor state, Tensor? inv_temperature",
        "Tensor",
    ),
}
for _name, (_arguments, _results) in ARGUMENTS.items():
    LIB.define(f"{_name}({_arguments}, str backend) -> {_results}", tags=TAGS)
    LIB.define(f"_{_name}({_arguments}) -> {_results}", tags=TAGS)
_OPS = getattr(torch.ops, NAMESPACE)


# By backend, as backends.py has it for the operators that all backends share.
_COMPILED = SimpleNamespace(**{name: getattr(_OPS, f"_{name}") for name in ARGUMENTS})
KERNELS: dict[str, Any] = {
    "cpu": _COMPILED,
    "cuda": _COMPILED,
    "triton": kernels("triton"),
    "reference": reference_backend,
}


def _implementation(name: str) -> Any:
    def implementation(*args: Any) -> Any:
        *rest, backend = args
        return getattr(KERNELS[backend], name)(*rest)

    return implementation


def _fake(policy: Tensor, token_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    n, k = token_ids.shape
    dtype = reference.inside(policy.device)
    values = policy.new_empty((n, k + 1), dtype=dtype)
    return values, policy.new_empty((n, reference_backend.TOPK_STATE), dtype=dtype)


def _backward_fake(grad: Tensor, policy: Tensor, *_: Any) -> Tensor:
    return policy.new_empty(policy.shape)


for _name, _shapes in (("topk_logprobs", _fake), ("topk_logprobs_backward", _backward_fake)):
    LIB.impl(_name, _implementation(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shapes, lib=LIB)


class _TopkLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        policy: Tensor,
        token_ids: Tensor,
        inv_temperature: Tensor | None,
        mask: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        values, state = _OPS.topk_logprobs(policy, token_ids, inv_temperature, mask, backend)
        return values, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        keep(ctx, *tensors, output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        policy, token_ids, inv_temperature, mask, state = kept(ctx)
        grad = grads[0] if mask is None else torch.where(mask[:, None], grads[0], 0)
        if recorded(policy, grad):
            x = policy.view_as(policy)  # see autograd.composed_gradients
            flat = x.reshape(-1, policy.shape[-1])
            values = reference.topk_logprobs(flat, token_ids, inv_temperature, mask)
            (found,) = torch.autograd.grad(values, x, grad, create_graph=True)
            return found, None, None, None, None
        gradient: Tensor = _OPS.topk_logprobs_backward(
            grad.contiguous(), policy, token_ids, state, inv_temperature, ctx.backend
        )
        return gradient, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        policy: Tensor,
        token_ids: Tensor,
        inv_temperature: Tensor | None,
        mask: Tensor | None,
        backend: str,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        size, k = info.batch_size, token_ids.shape[-1]
        policy = front(policy, in_dims[0], size)
        rows = policy[0].numel() // policy.shape[-1]
        values, state = _TopkLogprobs.apply(
            policy,
            per_row(token_ids, in_dims[1], size, rows, k),
            per_row(inv_temperature, in_dims[2], size, rows),
            per_row(mask, in_dims[3], size, rows),
            backend,
        )
        return (values.view(size, rows, k + 1), state.view(size, rows, state.shape[-1])), (0, 0)


def topk_logprobs(
    policy: Tensor,
    token_ids: Tensor,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    *,
    backend: str,
) -> Tensor:
    """Values of operator topk_logprobs, differentiable in the policy any number of times."""
    out: Tensor
    out, _ = applied(_TopkLogprobs, policy, token_ids, inv_temperature, mask, backend)
    return out
