"""The reference backend: the operators on fusedkl/reference.py, over blocks of rows.

The portable fallback, exempt from the promise of one pass; deterministic for any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from .layout import blocks
from .reference import STATE, inside, result_dtype, rows, sums_of_rows
from .reference import topk_logprobs as reference_topk
from .reference_merge import merge_states as merge_states
from .reference_parts import row_sum, softmax


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd on, also inside an operator that a TorchDispatchMode runs below autograd."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def _part(t: Tensor | None, part: slice) -> Tensor | None:
    return t if t is None or t.shape[0] == 1 else t[part]


def _flat(t: Tensor) -> Tensor:
    return t.detach().reshape(-1, t.shape[-1])


def row_stats(
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Operator `row_stats` (fusedkl/ops.py)."""
    x, y = _flat(policy), None if reference is None else _flat(reference)
    values = []
    state = x.new_zeros((x.shape[0], len(STATE)), dtype=inside(x.device))
    with torch.no_grad():
        for part in blocks(*x.shape):
            ids, inv, counted = (_part(t, part) for t in (token_ids, inv_temperature, mask))
            block, columns = rows(
                x[part],
                None if y is None else y[part],
                ids,
                fields,
                parameter,
                inv,
                counted,
                valid_vocab,
                softcap,
            )
            values.append(block)
            for name, column in columns.items():
                kept = column if counted is None else torch.where(counted[:, None], column, 0)
                state[part, STATE.index(name)] = kept.squeeze(-1)
        dtype = result_dtype(policy, reference)
        return torch.cat(values, -1).to(dtype).contiguous(), state


def row_stats_backward(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    policy_grad: bool,
    reference_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Operator `row_stats_backward` (fusedkl/ops.py): autograd through `rows`."""
    x, y = _flat(policy), None if reference is None else _flat(reference)
    other = policy if reference is None else reference
    outputs = [
        policy.new_empty(policy.shape if policy_grad else (0,)),
        other.new_empty(other.shape if reference_grad else (0,)),
    ]
    asked = [policy_grad, reference_grad and y is not None]
    flat = [_flat(out) for out, ask in zip(outputs, asked, strict=True) if ask]
    for part in blocks(*x.shape) if flat else ():
        upstream = grad[:, part]
        with _recording():
            leaves = [t[part].detach() for t in (x, y) if t is not None]
            wanted = [t.requires_grad_() for t, ask in zip(leaves, asked, strict=False) if ask]
            ids, inverse = _part(token_ids, part), _part(inv_temperature, part)
            block_y = leaves[1] if y is not None else None
            values, _ = rows(
                leaves[0],
                block_y,
                ids,
                fields,
                parameter,
                inverse,
                None,
                valid_vocab,
                softcap,
            )
            # A field of one row alone leaves the other a gradient of 0.
            upstream_ = upstream.to(values.dtype)
            if values.requires_grad:
                found = torch.autograd.grad(values, wanted, upstream_, materialize_grads=True)
            else:  # no field reads the row that wants a gradient
                found = tuple(torch.zeros_like(t) for t in wanted)
        live = (upstream != 0).any(0)[:, None]  # 0 times the NaN of a bad row would be NaN
        for out, gradient in zip(flat, found, strict=True):
            out[part] = torch.where(live, gradient, 0)
    return outputs[0], outputs[1]


def row_stats_backward_(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
    reference_grad: bool,
) -> Tensor:
    """Operator `row_stats_backward_` (fusedkl/ops.py): computed beside, then copied."""
    policy_out, reference_out = row_stats_backward(
        grad,
        policy,
        reference,
        token_ids,
        state,
        fields,
        parameter,
        inv_temperature,
        valid_vocab,
        softcap,
        True,
        reference_grad,
    )
    policy.copy_(policy_out)
    return reference_out


def row_stats_with_gradient(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    fields: list[str],
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `row_stats_with_gradient` (fusedkl/ops.py): one after the other."""
    controls = (valid_vocab, softcap)
    values, state = row_stats(
        policy, reference, None, fields, parameter, inv_temperature, mask, *controls
    )
    gradient, _ = row_stats_backward(
        grad,
        policy,
        reference,
        None,
        state,
        fields,
        parameter,
        inv_temperature,
        *controls,
        True,
        False,
    )
    return values, state, gradient


def row_sums(
    policy: Tensor,
    reference: Tensor,
    state: Tensor,
    field: str,
    parameter: float | None,
    inv_temperature: Tensor | None,
    mask: Tensor | None,
    valid_vocab: int | None,
    softcap: float | None,
) -> Tensor:
    """Operator `row_sums` (fusedkl/ops.py)."""
    x, y = _flat(policy), _flat(reference)
    out = state.new_zeros((x.shape[0], 3))
    for part in blocks(*x.shape):
        inv, counted = (_part(t, part) for t in (inv_temperature, mask))
        with _recording():
            sums = sums_of_rows(
                x[part], y[part], state[part], field, parameter, inv, valid_vocab, softcap
            ).detach()
        out[part] = sums if counted is None else torch.where(counted[:, None], sums, 0)
    return out


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Operator `scale_gradient_` (fusedkl/ops.py)."""
    gradient.copy_(torch.where(factor == 0, 0, gradient * factor))


# Columns of the state that the cpu backend's topk_logprobs_backward needs; here they stay 0.
TOPK_STATE = 4


def topk_logprobs(
    policy: Tensor, token_ids: Tensor, inv_temperature: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Operator `topk_logprobs` (fusedkl/topk_ops.py)."""
    x, found = _flat(policy), []
    with torch.no_grad():
        for part in blocks(*x.shape):
            inverse, counted = _part(inv_temperature, part), _part(mask, part)
            found.append(reference_topk(x[part], token_ids[part], inverse, counted))
    values = torch.cat(found)
    return values, values.new_zeros((x.shape[0], TOPK_STATE))


def topk_logprobs_backward(
    grad: Tensor,
    policy: Tensor,
    token_ids: Tensor,
    state: Tensor,
    inv_temperature: Tensor | None,
) -> Tensor:
    """Operator `topk_logprobs_backward` (fusedkl/topk_ops.py): autograd through its values."""
    x, out = _flat(policy), policy.new_empty(policy.shape)
    flat = _flat(out)
    for part in blocks(*x.shape):
        with _recording():
            leaf = x[part].detach().requires_grad_()
            inverse = _part(inv_temperature, part)
            values = reference_topk(leaf, token_ids[part], inverse, None)
            (found,) = torch.autograd.grad(values, leaf, grad[part].to(values.dtype))
        live = (grad[part] != 0).any(-1, keepdim=True)
        flat[part] = torch.where(live, found, 0)
    return out


def log_softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator `log_softmax` (fusedkl/ops.py)."""
    x = _flat(logits)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for part in blocks(*x.shape):
        block = x[part].to(inside(x.device))
        p = softmax(block, block.new_ones(1, 1))
        out[part] = torch.where(p.bad, torch.nan, (block - p.top) - p.log_mass)
    return out.view(logits.shape)


def log_softmax_backward(grad: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator `log_softmax_backward` (fusedkl/ops.py): grad - exp(output) sum(grad)."""
    g, z = _flat(grad), _flat(output)
    out = torch.empty(z.shape, dtype=dtype, device=z.device)
    for part in blocks(*z.shape):
        upstream = g[part].to(inside(z.device))
        out[part] = upstream - torch.exp(z[part].to(upstream.dtype)) * row_sum(upstream)
    return out.view(output.shape)


def ordered_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """Operator `ordered_sum` (fusedkl/ops.py)."""
    terms = values.to(inside(values.device))
    if weight is not None:
        terms = terms * weight.to(terms.dtype)
    return row_sum(terms).squeeze(-1).to(values.dtype)
