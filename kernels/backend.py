"""The operators (fusedkl/ops.py) in Triton: launches, and nothing that waits for the device.

row_stats is a sweep over segments (sweep.py or single.py), then one lane per row that makes a
RowState of them (finish.py), then careful.py, which looks at a flag per row. Besides the results
they take O(tokens) floats of scratch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backward import gradients, store_tokens, token_gradients
from .careful import careful
from .coefficients import CONSTANTS, prepare
from .elementwise import log_softmax as log_softmax_kernel
from .elementwise import log_softmax_backward as log_softmax_backward_kernel
from .elementwise import ordered_sum as ordered_sum_kernel
from .elementwise import scale_gradient
from .finish import finish
from .launch import aligned, architecture, choose, on, pieces
from .single import sweep_single
from .state import STATE_COLUMNS
from .sweep import COLUMNS, sweep_pair

PAIR_FIELDS = ("forward_kl", "reverse_kl")
LANES = 32
CAREFUL_BLOCK = 512
ROW_BLOCK = 2048
SCALE_BLOCK = 4096


def refuse_float64(*tensors: Tensor | None) -> None:
    """A TypeError for what these kernels do not take."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            raise TypeError(
                'backend="triton" takes float32, bfloat16 and float16 logits; got float64'
            )


def _is_pair(fields: list[str]) -> bool:
    return any(name in PAIR_FIELDS or name.startswith("ref_") for name in fields)


def _row_options(
    inv_temperature: Tensor | None, mask: Tensor | None, stand_in: Tensor
) -> tuple[Tensor, Tensor, int]:
    """1/T, the mask as bytes, and what of them there is: 1 a mask, 2 a 1/T, 4 one for each row.

    Pointers of the right dtype stand in for what is not there: no kernel is compiled twice for it.
    """
    flags = 0
    if mask is not None:
        flags |= 1
    if inv_temperature is not None:
        flags |= 2 | (4 if inv_temperature.numel() > 1 else 0)
    inverse = stand_in if inv_temperature is None else inv_temperature
    counted = (stand_in if mask is None else mask.contiguous()).view(torch.uint8)
    return inverse, counted, flags


def row_stats(
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    fields: list[str],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Operator `row_stats`."""
    refuse_float64(policy, reference)
    n, vocab = math.prod(policy.shape[:-1]), policy.shape[-1]
    k = 0 if token_ids is None else token_ids.shape[1]
    lines = sum(k if name.endswith("logprob") else 1 for name in fields)
    device = policy.device
    values = torch.empty((lines, n), dtype=torch.float32, device=device)
    state = torch.empty((n, STATE_COLUMNS.value), dtype=torch.float64, device=device)
    pair = _is_pair(fields)
    other = reference if pair and reference is not None else policy
    dtypes = (policy.dtype, other.dtype)
    sizes = choose(vocab, dtypes, architecture(device))
    segments = -(-vocab // sizes.segment)
    parts = torch.empty(segments * COLUMNS.value * n + n, dtype=torch.float32, device=device)
    inverse, counted, flags = _row_options(inv_temperature, mask, state)
    ids = state.view(torch.int64) if token_ids is None else token_ids
    names = tuple(fields)
    shape = {"WIDTH": sizes.width, "HALVES": sizes.halves, "num_warps": 1, "num_stages": 1}
    with on(device):
        for piece in pieces([policy, other]):
            x, y = piece.tensors
            xs, ys = piece.strides
            grid = (piece.rows, segments)
            where = (n, piece.inner, piece.first, vocab, sizes.segment)
            if pair:
                sweep_pair[grid](
                    x, y, parts, inverse, counted, *where, *xs, *ys, flags,
                    REVERSE="reverse_kl" in names,
                    ENTROPY="entropy" in names,
                    REF_ENTROPY="ref_entropy" in names,
                    ALIGNED=aligned(piece),
                    **shape,
                )  # fmt: skip
            else:
                sweep_single[grid](
                    x, parts, inverse, counted, *where, *xs, flags,
                    ENTROPY="entropy" in names,
                    ALIGNED=aligned(piece),
                    **shape,
                )  # fmt: skip
            finish[(-(-piece.rows // LANES),)](
                x, y, parts, inverse, counted, ids, values, state,
                n, k, piece.inner, piece.first, piece.rows, vocab, segments, flags, *xs, *ys,
                FIELDS=names, PAIR=pair, LANES=LANES, num_warps=1,
            )  # fmt: skip
            if pair:
                careful[(piece.rows,)](
                    x, y, parts, inverse, ids, values, state,
                    n, k, piece.inner, piece.first, vocab, segments, flags, *xs, *ys,
                    FIELDS=names, BLOCK=CAREFUL_BLOCK, num_warps=4,
                )  # fmt: skip
    return values, state


def _token_field(fields: list[str], name: str, k: int) -> int | None:
    """The first line of grad that belongs to `name`."""
    line = 0
    for field in fields:
        if field == name:
            return line
        line += k if field.endswith("logprob") else 1
    return None


def _backward(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    inv_temperature: Tensor | None,
    policy_grad: Tensor | None,
    reference_grad: Tensor | None,
) -> None:
    refuse_float64(policy, reference)
    n, vocab = math.prod(policy.shape[:-1]), policy.shape[-1]
    if n == 0 or (policy_grad is None and reference_grad is None):
        return
    k = 0 if token_ids is None else token_ids.shape[1]
    device = policy.device
    pair = _is_pair(fields)
    other = reference if pair and reference is not None else policy
    names = tuple(fields)
    grad = grad.contiguous()
    constants = torch.empty((CONSTANTS.value, n), dtype=torch.float32, device=device)
    inverse, _, flags = _row_options(inv_temperature, None, state)
    sizes = choose(vocab, (policy.dtype, other.dtype), architecture(device))
    chunks = -(-vocab // sizes.chunk)
    with on(device):
        prepare[(-(-n // LANES),)](
            grad, state, inverse, constants, n, k, flags, FIELDS=names, LANES=LANES, num_warps=1
        )
        out_x = policy if policy_grad is None else policy_grad
        out_y = out_x if reference_grad is None else reference_grad
        for piece in pieces([policy, other, out_x, out_y]):
            x, y, gx, gy = piece.tensors
            strides = [step for steps in piece.strides for step in steps]
            tokens = []
            for name, gradient, steps, wanted in (
                ("logprob", gx, piece.strides[2], policy_grad),
                ("ref_logprob", gy, piece.strides[3], reference_grad),
            ):
                line = _token_field(fields, name, k)
                if line is None or wanted is None or token_ids is None or k == 0:
                    continue
                found = torch.empty((n, k), dtype=torch.float64, device=device)
                grid = (piece.rows, -(-k // LANES))
                token_gradients[grid](
                    x, y, grad, state, token_ids, inverse, found,
                    n, k, piece.inner, piece.first, line, vocab, flags, *strides[:4],
                    FIELDS=names, POLICY=name == "logprob", PAIR=pair, BLOCK=LANES, num_warps=1,
                )  # fmt: skip
                tokens.append((grid, gradient, found, steps))
            gradients[(piece.rows, chunks)](
                x, y, gx, gy, constants, inverse,
                n, piece.inner, piece.first, vocab, vocab, sizes.chunk, flags, *strides,
                FIELDS=names, POLICY=policy_grad is not None, REFERENCE=reference_grad is not None,
                ALIGNED=aligned(piece), BLOCK=sizes.block, num_warps=sizes.warps, num_stages=1,
            )  # fmt: skip
            for grid, gradient, found, steps in tokens:
                store_tokens[grid](
                    gradient, found, token_ids, constants,
                    n, k, piece.inner, piece.first, vocab, *steps, BLOCK=LANES, num_warps=1,
                )  # fmt: skip


def row_stats_backward(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    inv_temperature: Tensor | None,
    policy_grad: bool,
    reference_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Operator `row_stats_backward`."""
    other = policy if reference is None else reference
    gx = policy.new_empty(policy.shape if policy_grad else (0,))
    gy = other.new_empty(other.shape if reference_grad and reference is not None else (0,))
    _backward(
        grad,
        policy,
        reference,
        token_ids,
        state,
        fields,
        inv_temperature,
        gx if policy_grad else None,
        gy if reference_grad and reference is not None else None,
    )
    return gx, gy


def row_stats_backward_(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    token_ids: Tensor | None,
    state: Tensor,
    fields: list[str],
    inv_temperature: Tensor | None,
    reference_grad: bool,
) -> Tensor:
    """Operator `row_stats_backward_`: a tile is read before it is written, so nothing is copied."""
    other = policy if reference is None else reference
    gy = other.new_empty(other.shape if reference_grad and reference is not None else (0,))
    _backward(
        grad,
        policy,
        reference,
        token_ids,
        state,
        fields,
        inv_temperature,
        policy,
        gy if reference_grad and reference is not None else None,
    )
    return gy


def row_stats_with_gradient(
    grad: Tensor,
    policy: Tensor,
    reference: Tensor | None,
    fields: list[str],
    inv_temperature: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator `row_stats_with_gradient`: one after the other."""
    values, state = row_stats(policy, reference, None, fields, inv_temperature, mask)
    gradient, _ = row_stats_backward(
        grad, policy, reference, None, state, fields, inv_temperature, True, False
    )
    return values, state, gradient


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Operator `scale_gradient_`; the gradient is contiguous."""
    if gradient.numel():
        with on(gradient.device):
            scale_gradient[(-(-gradient.numel() // SCALE_BLOCK),)](
                gradient, factor, gradient.numel(), BLOCK=SCALE_BLOCK
            )


def log_softmax(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator `log_softmax`; in float64 inside if either dtype is."""
    out = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    with on(logits.device):
        for piece in pieces([logits]):
            log_softmax_kernel[(piece.rows,)](
                *piece.tensors, out, piece.inner, piece.first, logits.shape[-1], *piece.strides[0],
                DTYPE=_inside(logits, out), BLOCK=ROW_BLOCK, num_warps=8,
            )  # fmt: skip
    return out


def log_softmax_backward(grad: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
    """Operator `log_softmax_backward`."""
    output = output.contiguous()
    out = torch.empty(output.shape, dtype=dtype, device=output.device)
    with on(output.device):
        for piece in pieces([grad]):
            log_softmax_backward_kernel[(piece.rows,)](
                *piece.tensors, output, out, piece.inner, piece.first, grad.shape[-1],
                *piece.strides[0], DTYPE=_inside(grad, output, out), BLOCK=ROW_BLOCK, num_warps=8,
            )  # fmt: skip
    return out


def _inside(*tensors: Tensor) -> object:
    import triton.language as tl

    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def ordered_sum(values: Tensor, weight: Tensor | None) -> Tensor:
    """Operator `ordered_sum`: one program."""
    out = values.new_empty(())
    flat = values.reshape(-1)
    by = flat if weight is None else weight.reshape(-1)
    with on(values.device):
        ordered_sum_kernel[(1,)](
            flat, by, out, flat.numel(), _step(flat), _step(by),
            WEIGHTED=weight is not None, BLOCK=ROW_BLOCK,
        )  # fmt: skip
    return out


def _step(t: Tensor) -> int:
    return t.stride(0) if t.numel() else 1
