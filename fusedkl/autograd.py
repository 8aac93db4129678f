"""The operators' derivatives: autograd.Functions around them, and double backward by composition.

Functions, not register_autograd, whose operators functorch refuses and forward mode gets silently
wrong. Forward mode raises: forward_mode.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import distributed, ops, reference
from .forward_mode import applied
from .layout import dense
from .saving import keep, kept, ordinary

# The namespace of the operators that ops.py has defined.
OPS = getattr(torch.ops, ops.NAMESPACE)

_PLAIN = (Tensor, torch.nn.Parameter)
_F = TypeVar("_F", bound=Callable[..., Any])


def intercepted(*inputs: Any) -> bool:
    """Whether something traces, transforms or overrides what is done with these inputs."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
        return True
    for t in inputs:  # noqa: SIM110 a generator costs more than what it would do here
        if isinstance(t, Tensor) and type(t) not in _PLAIN:
            return True
    return False


def batched(t: Tensor) -> bool:
    """A batch that torch.func or autograd itself (is_grads_batched) hides in a plain tensor."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t)


def call(name: str, *args: Any) -> Any:
    """Operator fusedkl::name; past the dispatcher (20 us from Python) where nothing needs it."""
    if intercepted(*args) or any(isinstance(t, Tensor) and batched(t) for t in args):
        return getattr(OPS, name)(*args)
    return ops.run(name, *args)


def differentiated(*inputs: Tensor | None) -> bool:
    """Whether autograd or a transformation has to know of an operator on these inputs."""
    if intercepted(*inputs):
        return True
    if torch.is_grad_enabled():
        for t in inputs:
            if t is not None and t.requires_grad:
                return True
    return False


def recorded(*inputs: Tensor | None) -> bool:
    """Whether a backward now running is itself differentiated by these inputs.

    torch.compile traces backward with gradients enabled and refuses double backward by itself.
    After torch.func.vjp, backward runs with gradients enabled, on what is left of its inputs: they
    say that they require a gradient, and no view of them does.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(t.view_as(t).requires_grad for t in inputs if t is not None)


def _signed(forward: _F) -> _F:
    """Remembers its signature, which Function.apply() would work out at every call (50 us)."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


class _RowStats(torch.autograd.Function):
    @staticmethod
    @_signed
    def forward(
        policy: Tensor,
        reference_: Tensor | None,
        token_ids: Tensor | None,
        fields: tuple[str, ...],
        parameter: float | None,
        inv_temperature: Tensor | None,
        mask: Tensor | None,
        valid_vocab: int | None,
        softcap: float | None,
        inplace_grad: bool,
        shards: distributed.Shards | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        row = (policy, reference_, token_ids, fields, parameter, inv_temperature, mask)
        if shards is not None:
            return distributed.row_stats(*row, valid_vocab, softcap, shards, backend)
        values, state = call("row_stats", *row, valid_vocab, softcap, backend)
        return values, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        policy, reference_, token_ids, fields, parameter, inv_temperature, mask, *rest = inputs
        ctx.mark_non_differentiable(output[1])
        keep(ctx, policy, reference_, token_ids, inv_temperature, mask, output[1])
        ctx.fields = fields
        ctx.parameter = parameter
        ctx.valid_vocab, ctx.softcap, ctx.inplace, ctx.shards, ctx.backend = rest
        ctx.consumed = False

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.inplace and ctx.needs_input_grad[0]:
            _refuse_reuse(ctx)
        policy, reference_, token_ids, inv_temperature, mask, state = kept(ctx)
        policy_grad, reference_grad = ctx.needs_input_grad[:2]
        grad = grads[0].contiguous() if mask is None else torch.where(mask, grads[0], 0)
        fields = list(ctx.fields)
        gx: Tensor | None = None
        gy: Tensor | None = None
        if recorded(policy, reference_, grad):
            distributed.refuse(ctx.shards, "double backward")
            gx, gy = composed_gradients(
                grad, policy, reference_, token_ids, fields, inv_temperature, mask, ctx
            )
        elif ctx.shards is not None and ctx.shards.holds(ctx.valid_vocab) == 0:
            gx = torch.zeros_like(policy)
            gy = None if reference_ is None else torch.zeros_like(reference_)
        else:
            row = (
                *(grad, policy, reference_, token_ids, state, fields, ctx.parameter),
                *(inv_temperature, ctx.valid_vocab, ctx.softcap),
            )
            if ctx.inplace and policy_grad:
                gy = call("row_stats_backward_", *row, reference_grad, ctx.backend)
                gx = policy.detach()
            else:
                gx, gy = call("row_stats_backward", *row, policy_grad, reference_grad, ctx.backend)
        gx = gx if policy_grad else None
        gy = gy if reference_grad else None
        return gx, gy, None, None, None, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        distributed.refuse(args[10], "torch.vmap")
        # A batch of rows is only more rows.
        if args[9] and in_dims[0] is None:
            raise RuntimeError("inplace_grad=True: torch.vmap would write one policy many times")
        policy, reference_, ids, fields, parameter, inverse, mask, *rest = args
        size = info.batch_size
        policy = front(policy, in_dims[0], size)
        rows = policy[0].numel() // policy.shape[-1]

        def flat(t: Tensor | None, dim: int | None, *last: int) -> Tensor | None:
            return per_row(t, dim, size, rows, *last)

        values, state = _RowStats.apply(
            policy,
            None if reference_ is None else front(reference_, in_dims[1], size),
            None if ids is None else flat(ids, in_dims[2], ids.shape[-1]),
            fields,
            parameter,
            flat(inverse, in_dims[5]),
            flat(mask, in_dims[6]),
            *rest,
        )
        out = values.view(values.shape[0], size, rows), state.view(size, rows, state.shape[-1])
        return out, (1, 0)


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


def composed_gradients(
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
    y = None if reference_ is None else ordinary(reference_.view_as(reference_))
    values, _ = reference.rows(
        x.reshape(-1, x.shape[-1]),
        None if y is None else y.reshape(-1, y.shape[-1]),
        token_ids,
        fields,
        ctx.parameter,
        inv_temperature,
        mask,
        ctx.valid_vocab,
        ctx.softcap,
    )
    wanted = [
        t
        for t, needed in zip((x, y), ctx.needs_input_grad[:2], strict=True)
        if needed and t is not None
    ]
    if not all(t.requires_grad for t in wanted):
        raise RuntimeError("fusedkl: the result of torch.func.vjp is not differentiable; nest vjp")
    if not values.requires_grad:  # no field reads the row that wants a gradient
        none = [
            torch.zeros_like(t) if needed and t is not None else None
            for t, needed in zip((x, y), ctx.needs_input_grad[:2], strict=True)
        ]
        return none[0], none[1]
    found = torch.autograd.grad(
        values, wanted, grad.to(values.dtype), create_graph=True, materialize_grads=True
    )
    # A zero upstream gradient silences a NaN row, and stays differentiable everywhere else.
    silent = values.detach().isnan().any(0) & (grad == 0).all(0)
    silent = silent.view(*policy.shape[:-1], 1)
    kept = iter([torch.where(silent, 0, g) for g in found])
    gx = next(kept) if ctx.needs_input_grad[0] else None
    gy = next(kept) if ctx.needs_input_grad[1] else None
    return gx, gy


def front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """The batch dim of torch.vmap first, expanded where this argument has none; last stride 1."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return dense(t)


def per_row(t: Tensor | None, dim: int | None, size: int, rows: int, *last: int) -> Tensor | None:
    """What goes with each of `rows` rows, of all in a batch of torch.vmap; one 1/T for all, too."""
    if t is None:
        return None
    return front(t, dim, size).expand(size, rows, *last).reshape(size * rows, *last).contiguous()


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    @_signed
    def forward(logits: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        out: Tensor = call("log_softmax", logits, dtype, backend)
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
        if recorded(output, grad):
            inner = torch.promote_types(torch.promote_types(grad.dtype, ctx.dtype), torch.float32)
            g, z = grad.to(inner), output.to(inner)
            return (g - z.exp() * g.sum(-1, keepdim=True)).to(ctx.dtype), None, None
        args = (dense(grad), output, ctx.dtype, ctx.backend)
        out: Tensor = call("log_softmax_backward", *args)
        return out, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], logits: Tensor, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor, int]:
        out: Tensor = _LogSoftmax.apply(front(logits, in_dims[0], info.batch_size), dtype, backend)
        return out, 0


class _OrderedSum(torch.autograd.Function):
    @staticmethod
    @_signed
    def forward(values: Tensor, weight: Tensor | None, backend: str) -> Tensor:
        out: Tensor = call("ordered_sum", values, weight, backend)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep(ctx, inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, weight = kept(ctx)
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
        weights = None if weight is None else front(weight, in_dims[1], size)
        sums = [
            _OrderedSum.apply(row, None if weights is None else weights[i], backend)
            for i, row in enumerate(front(values, in_dims[0], size))
        ]
        return torch.stack(sums), 0


def row_stats(
    policy: Tensor,
    reference_: Tensor | None,
    token_ids: Tensor | None,
    fields: tuple[str, ...],
    parameter: float | None = None,
    inv_temperature: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    valid_vocab: int | None = None,
    softcap: float | None = None,
    inplace_grad: bool = False,
    shards: distributed.Shards | None = None,
    backend: str,
) -> Tensor:
    """Values [R, N] of operator row_stats, differentiable in policy and reference_.

    With shards the rows are slices; valid_vocab and token_ids are of the whole vocabulary.
    """
    if shards is not None:

        def of(place: distributed.Shards) -> Tensor:
            values, _ = applied(
                _RowStats, policy, reference_,
                None if token_ids is None else place.local_ids(token_ids, valid_vocab),
                fields, parameter, inv_temperature, mask, place.local_vocabulary(valid_vocab),
                softcap, inplace_grad, place, backend,
            )  # fmt: skip
            found: Tensor = values
            return found

        leads_back = any(t is not None and t.requires_grad for t in (policy, reference_))
        if backend == "reference" and leads_back and torch.is_grad_enabled():
            raise ValueError("backend='reference' has no gradients of slices (group=)")
        values, shards = distributed.placed(shards, of)
        if token_ids is not None:
            shards.check_ids(token_ids, mask, valid_vocab)
        return values
    args = (
        policy,
        reference_,
        token_ids,
        fields,
        parameter,
        inv_temperature,
        mask,
        valid_vocab,
        softcap,
    )
    out: Tensor
    if differentiated(policy, reference_):
        out, _ = applied(_RowStats, *args, inplace_grad, None, backend)
    else:
        out, _ = ops.run("row_stats", *args, backend)
    return out


def log_softmax(logits: Tensor, dtype: torch.dtype, *, backend: str) -> Tensor:
    """Operator log_softmax over the last dim, differentiable."""
    out: Tensor
    if differentiated(logits):
        out = applied(_LogSoftmax, logits, dtype, backend)
    else:
        out = ops.run("log_softmax", logits, dtype, backend)
    return out


def ordered_sum(values: Tensor, weight: Tensor | None, *, backend: str) -> Tensor:
    """sum(values * weight) of 1-D tensors of one dtype in a fixed order, differentiable in both."""
    if not differentiated(values, weight):
        total: Tensor = ops.run("ordered_sum", values, weight, backend)
        return total
    out: Tensor = applied(_OrderedSum, values, weight, backend)
    return out
