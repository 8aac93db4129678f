"""Gradients: one sweep that reads the logits once more and writes each gradient once.

Per token, with l = log p - log q (RowGradient of csrc/row_math.h):

    d/dx = moved (p - q) + p (reverse (l - R) + mass + information (log p + H))
    d/dy = ref_moved (p - q) + q (ref_forward (l + F) + mass + information (log q + H))
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coefficients import CONSTANTS, coefficients, row_gradients
from .formulas import FAR, LOG2E, NEAR, gap, gap_coefficients, gap_polynomial
from .layout import row_pointer, vectorised
from .state import load_state

# 16-bit gradients: expm1(u) = u + u^2/2 up to here, to 2e-4.
NEAR_HALF = tl.constexpr(0.03125)


@triton.jit
def _bounded(v):
    """A difference with an infinite or NaN logit, as a number that a weight of 0 makes 0."""
    return tl.maximum(tl.minimum(v, FAR), -FAR)


@triton.jit
def _moved(v, p, q, inv_t, series, ACCURATE: tl.constexpr):
    """p - q, from v = T l where they are close."""
    if ACCURATE:
        near = q * v * tl.fma(v, gap_polynomial(v, series), inv_t)
        return tl.where(tl.abs(v) <= (1.0 / inv_t) * NEAR, near, p - q)
    else:
        near = q * v * tl.fma(v, 0.5 * inv_t * inv_t, inv_t)
        return tl.where(tl.abs(v) <= (1.0 / inv_t) * NEAR_HALF, near, p - q)


@triton.jit
def _alone(p, logit, top, log_sum, entropy, mass, information, inv_t, INFORMATION: tl.constexpr):
    """p (mass + information (log p + H))"""
    if INFORMATION:
        log_p = _bounded((logit - top) * inv_t - log_sum)
        return p * tl.fma(log_p + entropy, information, mass)
    else:
        return p * mass


@triton.jit
def _token(
    x, y, c, inv_t, series, FIELDS: tl.constexpr, POLICY: tl.constexpr, REFERENCE: tl.constexpr,
    ACCURATE: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Both gradients of tokens, in fp32; c: the row's constants in the order of NAMES."""
    FORWARD: tl.constexpr = "forward_kl" in FIELDS
    REVERSE: tl.constexpr = "reverse_kl" in FIELDS
    MASS: tl.constexpr = "logsumexp" in FIELDS or "logprob" in FIELDS
    REF_MASS: tl.constexpr = "ref_logsumexp" in FIELDS or "ref_logprob" in FIELDS
    slope = inv_t * LOG2E
    gx = 0.0
    gy = 0.0
    scale = c[16] if PLAIN else 1.0
    p = tl.exp2(tl.fma(x, slope, -c[6])) * (c[7] * scale)
    q = p
    if FORWARD or REVERSE or REFERENCE:
        q = tl.exp2(tl.fma(y, slope, -c[11])) * (c[12] * scale)
    if FORWARD or REVERSE:
        d = x - y
        moved = _moved((d - c[0]) - c[1], p, q, inv_t, series, ACCURATE)
        if POLICY:
            gx = moved if PLAIN else moved * c[16]
            if REVERSE:
                gx = tl.fma(p * c[17], _bounded(((d - c[2]) - c[3]) * inv_t), gx)
        if REFERENCE:
            gy = moved * c[20]
            if FORWARD:
                gy = tl.fma(q * c[21], _bounded(((d - c[4]) - c[5]) * inv_t), gy)
    if POLICY and (MASS or "entropy" in FIELDS):
        gx += _alone(p, x, c[8], c[9], c[10], c[18], c[19], inv_t, "entropy" in FIELDS)
    if REFERENCE and (REF_MASS or "ref_entropy" in FIELDS):
        gy += _alone(q, y, c[13], c[14], c[15], c[22], c[23], inv_t, "ref_entropy" in FIELDS)
    return gx, gy


@unspecialised
def gradients(
    policy, reference, policy_grad, reference_grad, constants, inv_temperature,
    n: tl.int64, inner: tl.int64, first: tl.int64, width: tl.int64, vocab: tl.int64, chunk: tl.int64, per_row: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64,
    gx_outer: tl.int64, gx_inner: tl.int64, gy_outer: tl.int64, gy_inner: tl.int64,
    FIELDS: tl.constexpr, POLICY: tl.constexpr, REFERENCE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of rows first .. ; grid (rows, chunks). Logits from `vocab` on get exactly 0."""
    NEEDS_X: tl.constexpr = POLICY or "forward_kl" in FIELDS or "reverse_kl" in FIELDS
    NEEDS_Y: tl.constexpr = REFERENCE or "forward_kl" in FIELDS or "reverse_kl" in FIELDS
    # with one term only, its coefficient may as well be in the weights
    PLAIN: tl.constexpr = FIELDS == ("forward_kl",) and not REFERENCE
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    begin = tl.program_id(1).to(tl.int64) * chunk
    size = tl.minimum(chunk, width - begin)
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=(per_row & 2) != 0, other=1.0).to(tl.float32)
    column = constants + row
    c = (
        tl.load(column), tl.load(column + n), tl.load(column + 2 * n), tl.load(column + 3 * n),
        tl.load(column + 4 * n), tl.load(column + 5 * n), tl.load(column + 6 * n),
        tl.load(column + 7 * n), tl.load(column + 8 * n), tl.load(column + 9 * n),
        tl.load(column + 10 * n), tl.load(column + 11 * n), tl.load(column + 12 * n),
        tl.load(column + 13 * n), tl.load(column + 14 * n), tl.load(column + 15 * n),
        tl.load(column + 16 * n), tl.load(column + 17 * n), tl.load(column + 18 * n),
        tl.load(column + 19 * n), tl.load(column + 20 * n), tl.load(column + 21 * n),
        tl.load(column + 22 * n), tl.load(column + 23 * n), tl.load(column + 24 * n),
    )  # fmt: skip
    action = c[24]
    x_row = row_pointer(policy, local, inner, x_outer, x_inner) + begin
    y_row = row_pointer(reference, local, inner, y_outer, y_inner) + begin
    gx_row = row_pointer(policy_grad, local, inner, gx_outer, gx_inner) + begin
    gy_row = row_pointer(reference_grad, local, inner, gy_outer, gy_inner) + begin
    ACCURATE: tl.constexpr = (
        policy_grad.dtype.element_ty == tl.float32 or reference_grad.dtype.element_ty == tl.float32
    )
    lane = tl.arange(0, BLOCK)
    if ALIGNED:
        x_row = vectorised(x_row)
        y_row = vectorised(y_row)
        gx_row = vectorised(gx_row)
        gy_row = vectorised(gy_row)
    whole = tl.maximum(tl.minimum(size, vocab - begin), 0) // BLOCK * BLOCK
    series = gap_coefficients(inv_t)
    if action == 1.0:
        for i in tl.range(0, whole, BLOCK):
            x = 0.0
            y = 0.0
            if NEEDS_X:
                x = tl.load(x_row + (i + lane)).to(tl.float32)
            if NEEDS_Y:
                y = tl.load(y_row + (i + lane)).to(tl.float32)
            gx, gy = _token(x, y, c, inv_t, series, FIELDS, POLICY, REFERENCE, ACCURATE, PLAIN)
            if POLICY:
                tl.store(gx_row + (i + lane), gx.to(policy_grad.dtype.element_ty))
            if REFERENCE:
                tl.store(gy_row + (i + lane), gy.to(reference_grad.dtype.element_ty))
    else:
        whole = whole * 0
    read = tl.where(action == 1.0, vocab - begin, 0)
    fill = tl.where(action == 0.0, 0.0, float("nan"))
    for i in tl.range(whole, size, BLOCK):
        inside = i + lane < size
        real = inside & (i + lane < read)
        x = 0.0
        y = 0.0
        if NEEDS_X:
            x = tl.load(x_row + (i + lane), mask=real, other=0.0).to(tl.float32)
        if NEEDS_Y:
            y = tl.load(y_row + (i + lane), mask=real, other=0.0).to(tl.float32)
        gx, gy = _token(x, y, c, inv_t, series, FIELDS, POLICY, REFERENCE, ACCURATE, PLAIN)
        other = tl.where(begin + i + lane < vocab, fill, 0.0)
        if POLICY:
            gx = tl.where(real, gx, other)
            tl.store(gx_row + (i + lane), gx.to(policy_grad.dtype.element_ty), mask=inside)
        if REFERENCE:
            gy = tl.where(real, gy, other)
            tl.store(gy_row + (i + lane), gy.to(reference_grad.dtype.element_ty), mask=inside)


@triton.jit
def _direct(grad, token_ids, row, n, k, token, line, live):
    """Sum of the gradients of every log-probability asked for of `token`; first: none came earlier."""
    total = tl.zeros(token.shape, tl.float64)
    for j in range(k):
        same = tl.load(token_ids + row * k + j) == token
        g = tl.load(grad + (line + j) * n + row).to(tl.float64)
        total += tl.where(same, g, 0.0)
    return total


@unspecialised
def token_gradients(
    policy, reference, grad, states, token_ids, inv_temperature, found,
    n: tl.int64, k: tl.int64, inner: tl.int64, first: tl.int64, line: tl.int64, vocab: tl.int64, per_row: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64,
    FIELDS: tl.constexpr, POLICY: tl.constexpr, PAIR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """found[n, k]: in float64, the gradient at each token whose log-probability was asked for.

    Made before the sweep, which may overwrite the logits, and stored after it (`store_tokens`).
    """
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=(per_row & 2) != 0, other=1.0).to(tl.float64)
    token = tl.load(token_ids + row * k + j, mask=j < k, other=-1)
    inside = (token >= 0) & (token < vocab)
    state = load_state(states, row, row >= 0)
    c = coefficients(row_gradients(grad, row, n, k, row >= 0, FIELDS), state, inv_t)
    x = 0.0
    y = 0.0
    log_p = 0.0
    log_q = 0.0
    if POLICY or PAIR:
        x_row = row_pointer(policy, local, inner, x_outer, x_inner)
        x = tl.load(x_row + token, mask=inside, other=0.0).to(tl.float64)
        log_p = (x * inv_t - state[0]) - state[1]
    if PAIR or not POLICY:
        y_row = row_pointer(reference, local, inner, y_outer, y_inner)
        y = tl.load(y_row + token, mask=inside, other=0.0).to(tl.float64)
        log_q = (y * inv_t - state[2]) - state[3]
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    moved = p * 0.0
    ratio = p * 0.0
    if PAIR:
        ratio = ((x - y) - state[4]) * inv_t - state[5]
        moved = tl.where(
            (q > 0.0) & (ratio < 1.0), q * (gap(tl.minimum(ratio, 1.0)) + ratio), p - q
        )
    if POLICY:
        own = p * (c[2] + tl.where(c[3] != 0.0, c[3] * (log_p + state[8]), 0.0))
        own += tl.where(c[1] != 0.0, c[1] * p * (ratio - state[7]), 0.0)
        value = tl.where(p > 0.0, own, 0.0) + tl.where(c[0] != 0.0, c[0] * moved, 0.0)
    else:
        own = q * (c[6] + tl.where(c[7] != 0.0, c[7] * (log_q + state[9]), 0.0))
        own += tl.where(c[5] != 0.0, c[5] * q * (ratio + state[6]), 0.0)
        value = tl.where(q > 0.0, own, 0.0) + tl.where(c[4] != 0.0, c[4] * moved, 0.0)
    value += _direct(grad, token_ids, row, n, k, token, line, inside) * inv_t
    nan = tl.where(state[1] != state[1], float("nan"), 0.0)
    tl.store(found + row * k + j, value + nan, mask=j < k)


@unspecialised
def store_tokens(
    gradient, found, token_ids, constants,
    n: tl.int64, k: tl.int64, inner: tl.int64, first: tl.int64, vocab: tl.int64, g_outer: tl.int64, g_inner: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """found[n, k] into the gradient, each token once, unless the row's gradient is 0."""
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    if tl.load(constants + (CONSTANTS - 1) * n + row) == 0.0:
        return
    j = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row * k + j, mask=j < k, other=-1)
    repeated = token < 0
    for i in range(k):
        repeated = repeated | ((tl.load(token_ids + row * k + i) == token) & (i < j))
    value = tl.load(found + row * k + j, mask=j < k, other=0.0)
    out = row_pointer(gradient, local, inner, g_outer, g_inner) + token
    inside = (repeated == 0) & (token < vocab)
    tl.store(out, value.to(gradient.dtype.element_ty), mask=inside)
