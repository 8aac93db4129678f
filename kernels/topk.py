"""A row as K given tokens and all others together, the rest (csrc/topk_math.h); its launches.

The sweep of single.py reads the row once, with the given tokens taken out: what they leave is
never a difference from 1. The gradient is that of the rest's logsumexp, with the given tokens'
own written over it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .finish import single_state
from .formulas import log1p, merge
from .gradient import row_stats_backward
from .launch import LANES, Call, aligned, on, pieces
from .layout import row_pointer, unspecialised
from .single import sweep_single
from .state import STATE_COLUMNS, select
from .sweep import COLUMNS

TOPK_STATE = tl.constexpr(4)  # of the whole row, and of the rest: largest logit / T, log of the sum


@triton.jit
def _logit(x_row, token, vocab, live, inv_t):
    """x/T of a token, in float64; NaN for an id that there is not."""
    inside = token < vocab
    found = tl.load(x_row + token, mask=live & (token >= 0) & inside, other=0.0).to(tl.float64)
    found = tl.where(inside & (found < float("inf")), found, float("nan"))
    return found * inv_t


@unspecialised
def topk_finish(
    policy, parts, token_ids, inv_temperature, mask, values, states,
    n: tl.int64, k: tl.int64, inner: tl.int64, first: tl.int64, rows: tl.int64, vocab: tl.int64,
    segments: tl.int64, per_row: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    LANES: tl.constexpr,
):  # fmt: skip
    """values[n, k + 1] and states[n, TOPK_STATE] of `rows` rows from `first`; LANES a program."""
    local = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = local < rows
    row = first + local
    counted = tl.load(mask + row, mask=live & ((per_row & 1) != 0), other=1) != 0
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=live & ((per_row & 2) != 0), other=1.0)
    inv_t = inv_t.to(tl.float64)
    rest = single_state(parts + row, n, inv_t, live)
    for i in range(1, segments):
        part = single_state(parts + i * COLUMNS * n + row, n, inv_t, live)
        rest = select(inv_t != inv_t, part, merge(rest, part, inv_t))
    rest_max = rest[0]
    rest_sum = rest[1]
    x_row = row_pointer(policy, local, inner, x_outer, x_inner)
    # the heaviest of the rest and the tokens; then what the others add to it
    top = rest_max
    log_sum = rest_sum
    heaviest = row * 0 - 1
    for j in range(k):
        token = tl.load(token_ids + row * k + j, mask=live, other=-1)
        x = _logit(x_row, token, vocab, live & counted, inv_t)
        more = (token >= 0) & (x > top + log_sum)
        top = tl.where(more, x, top)
        log_sum = tl.where(more, 0.0, log_sum)
        heaviest = tl.where(more, j, heaviest)
    apart = (rest_max - top) + (rest_sum - log_sum)
    none = (heaviest < 0) | (rest_sum == float("-inf"))
    less = tl.where(none, 0.0, tl.exp(tl.where(none, 0.0, apart)))
    for j in range(k):
        token = tl.load(token_ids + row * k + j, mask=live, other=-1)
        x = _logit(x_row, token, vocab, live & counted, inv_t)
        other = (token >= 0) & (heaviest != j) & (x != float("-inf"))
        less += tl.where(other, tl.exp(tl.where(other, (x - top) - log_sum, 0.0)), 0.0)
    log_sum = tl.where(less == less, log_sum + log1p(less), less)
    bad = tl.where(log_sum == float("-inf"), float("nan"), 0.0)
    for j in range(k):
        token = tl.load(token_ids + row * k + j, mask=live, other=-1)
        x = _logit(x_row, token, vocab, live & counted, inv_t)
        found = tl.where((token >= 0) & counted, ((x - top) - log_sum) + bad, 0.0)
        tl.store(values + row * (k + 1) + j, found, mask=live)
    found = ((rest_max - top) + (rest_sum - log_sum)) + bad
    tl.store(values + row * (k + 1) + k, tl.where(counted, found, 0.0), mask=live)
    out = states + row * TOPK_STATE
    tl.store(out, tl.where(counted, top, 0.0), mask=live)
    tl.store(out + 1, tl.where(counted, log_sum, 0.0), mask=live)
    tl.store(out + 2, tl.where(counted, rest_max, 0.0), mask=live)
    tl.store(out + 3, tl.where(counted, rest_sum, 0.0), mask=live)


@unspecialised
def topk_prepare(
    policy, grad, token_ids, states, inv_temperature, rest_grad, rest_states, found,
    n: tl.int64, k: tl.int64, inner: tl.int64, first: tl.int64, rows: tl.int64, vocab: tl.int64,
    per_row: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    LANES: tl.constexpr,
):  # fmt: skip
    """The gradient rest_grad[n] of the rest's logsumexp, its states, and found[n, k] of tokens.

    With a_k of the tokens, b of the rest, all = sum a + b: b - e^rest all, and (a_k - p_k all)/T.
    """
    local = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = local < rows
    row = first + local
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=live & ((per_row & 2) != 0), other=1.0)
    inv_t = inv_t.to(tl.float64)
    state = states + row * TOPK_STATE
    top = tl.load(state, mask=live, other=0.0)
    log_sum = tl.load(state + 1, mask=live, other=0.0)
    rest_max = tl.load(state + 2, mask=live, other=0.0)
    rest_sum = tl.load(state + 3, mask=live, other=0.0)
    incoming = grad + row * (k + 1)
    b = tl.load(incoming + k, mask=live, other=0.0)
    every = b
    any_grad = b != 0.0
    for j in range(k):
        a = tl.load(incoming + j, mask=live, other=0.0)
        every += a
        any_grad = any_grad | (a != 0.0)
    # no mass anywhere is no distribution
    bad = any_grad & ((log_sum > float("-inf")) == 0)
    share = tl.exp((rest_max - top) + (rest_sum - log_sum))
    mine = tl.where(rest_sum > float("-inf"), b - every * share, 0.0)
    mine = tl.where(any_grad, tl.where(bad, 1.0, mine), 0.0)
    tl.store(rest_grad + row, mine, mask=live)
    out = rest_states + row * STATE_COLUMNS
    tl.store(out, rest_max, mask=live)
    tl.store(out + 1, tl.where(bad, float("nan"), rest_sum), mask=live)
    for i in tl.static_range(2, STATE_COLUMNS):
        tl.store(out + i, 0.0, mask=live)
    x_row = row_pointer(policy, local, inner, x_outer, x_inner)
    for j in range(k):
        token = tl.load(token_ids + row * k + j, mask=live, other=-1)
        x = _logit(x_row, token, vocab, live & any_grad, inv_t)
        a = tl.load(incoming + j, mask=live, other=0.0)
        value = inv_t * (a - every * tl.exp((x - top) - log_sum))
        value = tl.where(any_grad, tl.where(bad, float("nan"), value), 0.0)
        tl.store(found + row * k + j, value, mask=live)


@unspecialised
def topk_store(
    gradient, found, token_ids, k: tl.int64, vocab: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """found[n, k] into the gradient [n, vocab]; grid (rows, blocks of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row * k + j, mask=j < k, other=-1)
    value = tl.load(found + row * k + j, mask=j < k, other=0.0).to(tl.float32)
    given = (token >= 0) & (token < vocab)
    at = gradient + row * vocab + token
    tl.store(at, value.to(gradient.dtype.element_ty), mask=given)


def topk_logprobs(
    policy: Tensor, token_ids: Tensor, inv_temperature: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Operator `topk_logprobs` (fusedkl/topk_ops.py)."""
    call = Call(policy, None, token_ids, ["logsumexp"], None, inv_temperature, mask, None, None)
    n, k = token_ids.shape
    values = torch.empty((n, k + 1), dtype=torch.float64, device=policy.device)
    states = torch.empty((n, TOPK_STATE.value), dtype=torch.float64, device=policy.device)
    sizes = call.sizes()
    segments = -(-call.vocab // sizes.segment)
    parts = torch.empty(segments * COLUMNS.value * n, dtype=torch.float32, device=policy.device)
    inverse, counted, ids = call.pointers(states)
    in_order = ids.sort(-1).values
    with on(policy.device):
        for piece in pieces([policy]):
            sweep_single[(piece.rows, segments)](
                *piece.tensors, parts, inverse, counted, in_order, call.cap, n, piece.inner,
                piece.first, call.vocab, sizes.segment, *piece.strides[0], call.given, k,
                ENTROPY=False, GIVEN=True, MEAN=False, CAP=False, ALIGNED=aligned(piece),
                WIDTH=sizes.width, HALVES=sizes.halves, num_warps=1, num_stages=1,
            )  # fmt: skip
            topk_finish[(-(-piece.rows // LANES),)](
                *piece.tensors, parts, ids, inverse, counted, values, states, n, k, piece.inner,
                piece.first, piece.rows, call.vocab, segments, call.given, *piece.strides[0],
                LANES=LANES, num_warps=1,
            )  # fmt: skip
    return values, states


def topk_logprobs_backward(
    grad: Tensor, policy: Tensor, token_ids: Tensor, state: Tensor, inv_temperature: Tensor | None
) -> Tensor:
    """Operator `topk_logprobs_backward` (fusedkl/topk_ops.py)."""
    call = Call(policy, None, token_ids, ["logsumexp"], None, inv_temperature, None, None, None)
    n, k = token_ids.shape
    grad = grad.to(torch.float64).contiguous()
    rest_grad, found = grad.new_empty((1, n)), grad.new_empty((n, k))
    rest_states = grad.new_empty((n, STATE_COLUMNS.value))
    inverse, _, ids = call.pointers(state)
    with on(policy.device):
        for piece in pieces([policy]):
            topk_prepare[(-(-piece.rows // LANES),)](
                *piece.tensors, grad, ids, state.contiguous(), inverse, rest_grad, rest_states,
                found, n, k, piece.inner, piece.first, piece.rows, call.vocab, call.given,
                *piece.strides[0], LANES=LANES, num_warps=1,
            )  # fmt: skip
        controls = (["logsumexp"], None, inv_temperature, None, None)
        gradient, _ = row_stats_backward(
            rest_grad, policy, None, None, rest_states, *controls, True, False
        )
        if n:
            topk_store[(n, -(-k // LANES))](
                gradient, found, ids, k, call.vocab, BLOCK=LANES, num_warps=1
            )
    return gradient
