"""The operators: implementations by table lookup, fake kernels, and their derivatives.

fusedkl::row_stats(policy, reference?, token_ids?, fields, inv_temperature?, mask?, backend)
    policy, reference  [..., V], last stride 1, the leading dims (N rows in row-major order) with any
                       strides; float32, bfloat16, float16 or float64, the two may differ
    token_ids          int64 [N, K];  inv_temperature float64 [N] or [1], None = 1;  mask bool [N]
    -> values [R, N]   one row per field in order (K rows for logprob), float32 or float64
       state  [N, S]   float64, what the backend's own backward wants to remember; not differentiable
fusedkl::row_stats_backward(grad [R, N], ..., state, ...) -> gradients, contiguous, in each input's
    shape and dtype; one that was not asked for has shape [0]. Rows whose grads are all 0 get exactly
    0 and are not read. row_stats_backward_ writes the policy's gradient into the policy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import divergences, reference, validation
from ._library import LIB, NAMESPACE, OPERATORS
from .backends import kernels

__all__ = ["LIB", "STATE_COLUMNS", "log_softmax", "ordered_sum", "row_stats"]

STATE_COLUMNS = len(reference.STATE)
_OPS = torch.ops.fusedkl


def _implement(name: str) -> None:
    def implementation(*args: Any) -> Any:
        *rest, backend = args
        if name == "row_stats":
            validation.row_stats_contents(*rest)
        result = getattr(kernels(backend), name)(*rest)
        if name == "row_stats_backward_":
            # A kernel's raw writes are invisible to autograd, which must refuse to use what is gone.
            torch.autograd.graph.increment_version(args[1])
        return result

    LIB.impl(name, implementation, "CompositeExplicitAutograd")


for _name in OPERATORS:
    _implement(_name)


def _row_stats_fake(
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n = math.prod(policy.shape[:-1])
    r = divergences.value_rows(fields, 0 if token_ids is None else token_ids.shape[1])
    values = policy.new_empty((r, n), dtype=reference.result_dtype(policy, reference_))
    state = policy.new_empty((n, STATE_COLUMNS), dtype=reference.inside(policy.device))
    return values, state


def _row_stats_backward_fake(
    grad: Tensor,
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    inv_temperature: Tensor | None,
    policy_grad: bool,
    reference_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    def like(t: Tensor | None, wanted: bool) -> Tensor:
        given = policy if t is None else t
        return given.new_empty(given.shape if wanted and t is not None else (0,))

    return like(policy, policy_grad), like(reference_, reference_grad)


def _row_stats_backward_inplace_fake(
    grad: Tensor,
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    inv_temperature: Tensor | None,
    reference_grad: bool,
    backend: str,
) -> Tensor:
    given = policy if reference_ is None else reference_
    return given.new_empty(given.shape if reference_grad and reference_ is not None else (0,))


def _log_softmax_fake(logits: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return logits.new_empty(logits.shape, dtype=dtype)


def _log_softmax_backward_fake(
    grad: Tensor, output: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return output.new_empty(output.shape, dtype=dtype)


def _ordered_sum_fake(values: Tensor, weight: Tensor | None, backend: str) -> Tensor:
    return values.new_empty(())


for _name, _fake in (
    ("row_stats", _row_stats_fake),
    ("row_stats_backward", _row_stats_backward_fake),
    ("row_stats_backward_", _row_stats_backward_inplace_fake),
    ("log_softmax", _log_softmax_fake),
    ("log_softmax_backward", _log_softmax_backward_fake),
    ("ordered_sum", _ordered_sum_fake),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIB)


def _recorded() -> bool:
    """Whether a backward now running is itself differentiated.

    torch.compile traces backward with gradients enabled and refuses double backward by itself.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(
        policy: Tensor,
        reference_: Tensor | None,
        token_ids: Tensor | None,
        fields: tuple[str, ...],
        inv_temperature: Tensor | None,
        mask: Tensor | None,
        inplace_grad: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        values, state = _OPS.row_stats(
            policy, reference_, token_ids, fields, inv_temperature, mask, backend
        )
        return values, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        policy, reference_, token_ids, fields, inv_temperature, mask, inplace, backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(policy, reference_, token_ids, inv_temperature, mask, output[1])
        ctx.fields = fields
        ctx.inplace = inplace
        ctx.backend = backend
        ctx.consumed = False

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace:
            _refuse_reuse(ctx)
        policy, reference_, token_ids, inv_temperature, mask, state = ctx.saved_tensors
        policy_grad, reference_grad = ctx.needs_input_grad[:2]
        grad = grads[0].contiguous() if mask is None else torch.where(mask, grads[0], 0)
        fields = list(ctx.fields)
        gx: Tensor | None = None
        gy: Tensor | None = None
        if _recorded():
            gx, gy = _composed_gradients(
                grad, policy, reference_, token_ids, fields, inv_temperature, mask, ctx
            )
        elif ctx.inplace and policy_grad:
            gy = _OPS.row_stats_backward_(
                grad,
                policy,
                reference_,
                token_ids,
                state,
                fields,
                inv_temperature,
                reference_grad,
                ctx.backend,
            )
            gx = policy.detach()
        else:
            gx, gy = _OPS.row_stats_backward(
                grad,
                policy,
                reference_,
                token_ids,
                state,
                fields,
                inv_temperature,
                policy_grad,
                reference_grad,
                ctx.backend,
            )
        gx = gx if policy_grad else None
        gy = gy if reference_grad else None
        return gx, gy, None, None, None, None, None, None


def _refuse_reuse(ctx: Any) -> None:
    if torch.compiler.is_compiling():  # functionalised there: the graph sees no mutation
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_grad=True has no double backward (create_graph=True): the gradient replaces the "
            "logits that the second derivative would need. Use inplace_grad=False."
        )
    if ctx.consumed:
        raise RuntimeError(
            "inplace_grad=True allows one backward: the first one replaced policy_logits by their "
            "gradient. Use inplace_grad=False with retain_graph=True."
        )
    ctx.consumed = True


def _composed_gradients(
    grad: Tensor,
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    ctx: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients as a differentiable composition: double backward differentiates through this."""
    # Fresh views: a reference computed from the policy must not lead this gradient back to it.
    x = policy.view_as(policy)
    y = None if reference_ is None else reference_.view_as(reference_)
    width = policy.shape[-1]
    values, _ = reference.rows(
        x.reshape(-1, width),
        None if y is None else y.reshape(-1, width),
        token_ids,
        fields,
        inv_temperature,
        mask,
    )
    wanted = [
        t
        for t, needed in zip((x, y), ctx.needs_input_grad[:2], strict=True)
        if needed and t is not None
    ]
    found = torch.autograd.grad(values, wanted, grad.to(values.dtype), create_graph=True)
    # A zero upstream gradient silences a row without a number, but stays differentiable elsewhere.
    silent = (~torch.isfinite(values.detach()) & (grad == 0)).any(0) & (grad == 0).all(0)
    silent = silent.view(*policy.shape[:-1], 1)
    kept = iter([torch.where(silent, 0, g) for g in found])
    gx = next(kept) if ctx.needs_input_grad[0] else None
    gy = next(kept) if ctx.needs_input_grad[1] else None
    return gx, gy


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        out: Tensor = _OPS.log_softmax(logits, dtype, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.dtype = inputs[0].dtype
        ctx.backend = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (output,) = ctx.saved_tensors
        grad = grads[0]
        if _recorded():
            inner = torch.promote_types(torch.promote_types(grad.dtype, ctx.dtype), torch.float32)
            g, z = grad.to(inner), output.to(inner)
            return (g - z.exp() * g.sum(-1, keepdim=True)).to(ctx.dtype), None, None
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        out: Tensor = _OPS.log_softmax_backward(grad, output, ctx.dtype, ctx.backend)
        return out, None, None


class _OrderedSum(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, weight: Tensor | None, backend: str) -> Tensor:
        # Weight 0 means not counted: it must also silence a value that is inf or NaN.
        counted = values if weight is None else torch.where(weight != 0, values, 0)
        out: Tensor = _OPS.ordered_sum(counted, weight, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, weight = ctx.saved_tensors
        grad = grads[0].expand(values.shape)
        if weight is None:
            return grad, None, None
        to_weight = grad * values if ctx.needs_input_grad[1] else None
        return grad * weight, to_weight, None


def row_stats(
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    fields: tuple[str, ...],
    inv_temperature: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    inplace_grad: bool = False,
    backend: str,
) -> Tensor:
    """Values [R, N] of operator row_stats, differentiable in policy and reference_."""
    values, _ = _RowStats.apply(
        policy, reference_, token_ids, fields, inv_temperature, mask, inplace_grad, backend
    )
    out: Tensor = values
    return out


def log_softmax(logits: Tensor, dtype: torch.dtype, *, backend: str) -> Tensor:
    """Operator log_softmax over the last dim, differentiable."""
    out: Tensor = _LogSoftmax.apply(logits, dtype, backend)
    return out


def ordered_sum(values: Tensor, weight: Tensor | None, *, backend: str) -> Tensor:
    """sum(values * weight) of 1-D tensors of one dtype in a fixed order, differentiable in both."""
    out: Tensor = _OrderedSum.apply(values, weight, backend)
    return out
