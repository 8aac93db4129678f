"""The operators' derivatives: autograd.Functions around them, and double backward by composition.

Functions, not register_autograd, whose operators functorch refuses and forward mode gets silently
wrong. Forward mode raises here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference

# The namespace of the operators that ops.py has defined.
_OPS = getattr(torch.ops, ops.NAMESPACE)


def _recorded(*inputs: Tensor | None) -> bool:
    """Whether a backward now running is itself differentiated by these inputs.

    torch.compile traces backward with gradients enabled and refuses double backward by itself.
    After torch.func.vjp, backward runs with gradients enabled, on what is left of its inputs: they
    say that they require a gradient, and no view of them does.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(t.view_as(t).requires_grad for t in inputs if t is not None)


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
        if ctx.inplace and ctx.needs_input_grad[0]:
            _refuse_reuse(ctx)
        policy, reference_, token_ids, inv_temperature, mask, state = ctx.saved_tensors
        policy_grad, reference_grad = ctx.needs_input_grad[:2]
        grad = grads[0].contiguous() if mask is None else torch.where(mask, grads[0], 0)
        fields = list(ctx.fields)
        gx: Tensor | None = None
        gy: Tensor | None = None
        if _recorded(policy, reference_, grad):
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

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        # A batch of rows is only more rows.
        if args[6] and in_dims[0] is None:
            raise RuntimeError("inplace_grad=True: torch.vmap would write one policy many times")
        policy, reference_, ids, fields, inverse, mask, *rest = args
        size = info.batch_size
        policy = _front(policy, in_dims[0], size)
        rows = policy[0].numel() // policy.shape[-1]

        def flat(t: Tensor | None, dim: int | None, *last: int) -> Tensor | None:
            if t is None:
                return None
            batched = _front(t, dim, size).expand(size, rows, *last)  # one 1/T for all rows, too
            return batched.reshape(size * rows, *last).contiguous()

        values, state = _RowStats.apply(
            policy,
            None if reference_ is None else _front(reference_, in_dims[1], size),
            None if ids is None else flat(ids, in_dims[2], ids.shape[-1]),
            fields,
            flat(inverse, in_dims[4]),
            flat(mask, in_dims[5]),
            *rest,
        )
        out = values.view(values.shape[0], size, rows), state.view(size, rows, state.shape[-1])
        return out, (1, 0)


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
        inv_temperature: Tensor | None,
        mask: Tensor | None,
        share: Tensor,
        reduce: Callable[[Tensor], Tensor],
        backend: str,
    ) -> Tensor:
        grad = share.expand(len(fields), -1)
        values, state, ctx.ahead = _OPS.row_stats_with_gradient(
            grad, policy, reference_, fields, inv_temperature, mask, backend
        )
        ctx.save_for_backward(policy, reference_, inv_temperature, mask, state, share)
        ctx.fields = fields
        ctx.backend = backend
        return reduce(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacked first: it raises where the logits were changed since, as any backward does.
        policy, reference_, inv_temperature, mask, state, share = ctx.saved_tensors
        ahead, ctx.ahead = ctx.ahead, None
        if _recorded(policy, reference_, grads[0]):
            grad = (grads[0] * share).expand(len(ctx.fields), -1)
            gx, _ = _composed_gradients(
                grad, policy, reference_, None, list(ctx.fields), inv_temperature, mask, ctx
            )
        elif ahead is not None and _plain(grads[0]) and _scales_exactly(ahead, grads[0]):
            _OPS.scale_gradient_(ahead, grads[0], ctx.backend)
            gx = ahead
        else:
            grad = torch.where(share != 0, grads[0] * share, 0).expand(len(ctx.fields), -1)
            gx, _ = _OPS.row_stats_backward(
                grad,
                policy,
                reference_,
                None,
                state,
                list(ctx.fields),
                inv_temperature,
                True,
                False,
                ctx.backend,
            )
        return gx, None, None, None, None, None, None, None


def _scales_exactly(gradient: Tensor, factor: Tensor) -> bool:
    """Whether gradient * factor is right where it is 0, and rounds nothing that matters."""
    by = float(factor)
    if gradient.dtype != torch.bfloat16:  # digits to spare
        return math.isfinite(by)
    return abs(math.frexp(by)[0]) in (0.0, 0.5)


def _plain(t: Tensor) -> bool:
    """Not a batch of gradients: neither torch.func's nor autograd's own (is_grads_batched)."""
    # By name: the key of autograd's own batches is not in torch._C.DispatchKey.
    return "Batched" not in str(torch._C._dispatch_keys(t))


def gradient_ahead(policy: Tensor, reference_: Tensor, weight: Tensor | None, backend: str) -> bool:
    """Whether `scalar_loss` may stand for `row_stats` and a reduction.

    float16 gradients must be scaled before their only rounding, so they cannot be made ahead of
    the loss scale. A graph being traced or transformed takes the plain operators, and so does the
    reference backend, whose sweeps are not of the kind that gains. On the CPU only: elsewhere
    backward must not look at the factor.
    """
    if backend != "cpu":
        return False
    if not torch.is_grad_enabled() or not policy.requires_grad or reference_.requires_grad:
        return False
    if policy.dtype == torch.float16 or (weight is not None and weight.requires_grad):
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(policy) in (Tensor, torch.nn.Parameter) and forward_ad._current_level < 0


def _refuse_reuse(ctx: Any) -> None:
    if torch.compiler.is_compiling():  # functionalised there: the graph sees no mutation
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inplace_grad=True has no double backward (create_graph=True): the gradient replaces "
            "the logits that the second derivative would need. Use inplace_grad=False."
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
    """The gradients as a differentiable composition, for double backward."""
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
    if not all(t.requires_grad for t in wanted):
        raise RuntimeError("fusedkl: the result of torch.func.vjp is not differentiable; nest vjp")
    found = torch.autograd.grad(values, wanted, grad.to(values.dtype), create_graph=True)
    # A zero upstream gradient silences a NaN row, and stays differentiable everywhere else.
    silent = values.detach().isnan().any(0) & (grad == 0).all(0)
    silent = silent.view(*policy.shape[:-1], 1)
    kept = iter([torch.where(silent, 0, g) for g in found])
    gx = next(kept) if ctx.needs_input_grad[0] else None
    gy = next(kept) if ctx.needs_input_grad[1] else None
    return gx, gy


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The batch dim of torch.vmap first, expanded where this argument has none; last stride 1."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


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
        if _recorded(output, grad):
            inner = torch.promote_types(torch.promote_types(grad.dtype, ctx.dtype), torch.float32)
            g, z = grad.to(inner), output.to(inner)
            return (g - z.exp() * g.sum(-1, keepdim=True)).to(ctx.dtype), None, None
        if grad.stride(-1) != 1:
            grad = grad.contiguous()
        out: Tensor = _OPS.log_softmax_backward(grad, output, ctx.dtype, ctx.backend)
        return out, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], logits: Tensor, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor, int]:
        out: Tensor = _LogSoftmax.apply(_front(logits, in_dims[0], info.batch_size), dtype, backend)
        return out, 0


class _OrderedSum(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, weight: Tensor | None, backend: str) -> Tensor:
        out: Tensor = _OPS.ordered_sum(values, weight, backend)
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

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], values: Tensor, weight: Tensor | None, backend: str
    ) -> tuple[Tensor, int]:
        size = info.batch_size
        weights = None if weight is None else _front(weight, in_dims[1], size)
        sums = [
            _OrderedSum.apply(row, None if weights is None else weights[i], backend)
            for i, row in enumerate(_front(values, in_dims[0], size))
        ]
        return torch.stack(sums), 0


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


def scalar_loss(
    policy: Tensor,
    reference_: Tensor,
    fields: tuple[str, ...],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    share: Tensor,
    reduce: Callable[[Tensor], Tensor],
    *,
    backend: str,
) -> Tensor:
    """reduce(row_stats(...)) with d reduce / d value = share [N] for every field."""
    out: Tensor = _ScalarLoss.apply(
        policy, reference_, fields, inv_temperature, mask, share, reduce, backend
    )
    return out


def log_softmax(logits: Tensor, dtype: torch.dtype, *, backend: str) -> Tensor:
    """Operator log_softmax over the last dim, differentiable."""
    out: Tensor = _LogSoftmax.apply(logits, dtype, backend)
    return out


def ordered_sum(values: Tensor, weight: Tensor | None, *, backend: str) -> Tensor:
    """sum(values * weight) of 1-D tensors of one dtype in a fixed order, differentiable in both."""
    out: Tensor = _OrderedSum.apply(values, weight, backend)
    return out
