"""Gradients: one sweep that reads the logits once more and writes each gradient once.

Per token, with l = log p - log q (RowGradient of csrc/gradient_math.h):

    d/dx = moved (p - q) + p (reverse (l - R) + mass + information (log p + H))
    d/dy = ref_moved (p - q) + q (ref_forward (l + F) + mass + information (log q + H))
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coefficients import CONSTANTS
from .family import bounded_ratio, family_slopes
from .formulas import (
    FAR,
    LOG2E,
    NEAR,
    cap_slope,
    capped,
    capped_difference,
    centred,
    gap_coefficients,
    gap_polynomial,
    multiply_add,
)
from .layout import is_half, load_words, row_pointer, unspecialised, vectorised
from .state import family_of, has, only

# 16-bit gradients: expm1(u) = u + u^2/2 up to here, to 2e-4.
NEAR_HALF = tl.constexpr(0.03125)
LARGEST = tl.constexpr(3.4028234663852886e38)  # a logit masked with it is as far as it says


@triton.jit
def _bounded(v, most):
    """A difference with an infinite or NaN logit, as a number that a weight of 0 makes 0."""
    return tl.maximum(tl.minimum(v, most), -most)


@triton.jit
def _moved(v, p_less_q, q, inv_t, series, ACCURATE: tl.constexpr, ROBUST: tl.constexpr):
    """p - q, from v = T l where they are close."""
    if ROBUST:  # powers of 1/T may leave the range
        u = v * inv_t
        near = q * u * tl.fma(u, gap_polynomial(u, gap_coefficients(1.0)), 1.0)
        return tl.where(tl.abs(u) <= NEAR, near, p_less_q)
    elif ACCURATE:
        near = q * v * tl.fma(v, gap_polynomial(v, series), inv_t)
        return tl.where(tl.abs(v) <= (1.0 / inv_t) * NEAR, near, p_less_q)
    else:
        near = q * v * tl.fma(v, 0.5 * inv_t * inv_t, inv_t)
        return tl.where(tl.abs(v) <= (1.0 / inv_t) * NEAR_HALF, near, p_less_q)


@triton.jit
def _alone(p, logit, top, log_sum, entropy, mass, information, inv_t, INFORMATION: tl.constexpr):
    """p (mass + information (log p + H))"""
    if INFORMATION:
        log_p = _bounded((logit - top) * inv_t - log_sum, FAR)
        return p * tl.fma(log_p + entropy, information, mass)
    else:
        return p * mass


@triton.jit
def _probability(logit, slope, inv_t, shift, weight, top, log_sum, ROBUST: tl.constexpr):
    """2^e weight: e = logit slope - shift, and the weight; ROBUST where they leave the range."""
    if ROBUST:
        return (_bounded((logit - top) * inv_t, FAR) - log_sum) * LOG2E, 1.0
    else:
        return multiply_add(logit, slope, -shift), weight


@triton.jit
def _token(
    x, y, c, inv_t, series, kind, cap,
    FIELDS: tl.constexpr, POLICY: tl.constexpr, REFERENCE: tl.constexpr,
    ACCURATE: tl.constexpr, PLAIN: tl.constexpr, ROBUST: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Both gradients of tokens, in fp32; c: the row's constants in the order of NAMES."""
    FORWARD: tl.constexpr = has(FIELDS, "forward_kl")
    REVERSE: tl.constexpr = has(FIELDS, "reverse_kl")
    RATIO: tl.constexpr = has(FIELDS, "log_ratio")
    MASS: tl.constexpr = has(FIELDS, "logsumexp") or has(FIELDS, "logprob") or RATIO
    MEAN: tl.constexpr = has(FIELDS, "mean_logprob")
    REF_MASS: tl.constexpr = has(FIELDS, "ref_logsumexp") or has(FIELDS, "ref_logprob") or RATIO
    FAMILY: tl.constexpr = family_of(FIELDS)
    EXACT: tl.constexpr = (ACCURATE or ROBUST) and not CAP
    d = x - y
    slope_x = 1.0
    slope_y = 1.0
    if CAP:
        d = capped_difference(x, y, cap)
        slope_x = cap_slope(x, cap)
        slope_y = cap_slope(y, cap)
        x = capped(x, cap)
        y = capped(y, cap)
    slope = inv_t * LOG2E
    gx = 0.0
    gy = 0.0
    scale = c[16] if PLAIN else 1.0
    log_x, per_x = _probability(x, slope, inv_t, c[6], c[7] * scale, c[8], c[9], ROBUST)
    of_x = tl.exp2(log_x)
    p = of_x * per_x
    q = p
    if FORWARD or REVERSE or REFERENCE or FAMILY != "":
        log_y, per_y = _probability(y, slope, inv_t, c[11], c[12] * scale, c[13], c[14], ROBUST)
        q = tl.exp2(log_y) * per_y
    if FAMILY != "":
        l = bounded_ratio(centred(d, x, y, c[0], c[1], EXACT), x, inv_t, FAMILY)  # noqa: E741
        of_p, of_q = family_slopes(
            p, q, log_x, log_y, per_x, per_y, l, c[24], c[25], c[26], kind, FAMILY
        )
        gx = of_p * c[27]
        gy = of_q * c[28]
        if FAMILY == "renyi":  # where it is infinite, so may be its slopes
            gx = tl.where(c[27] == 0.0, (p - q) * c[16], gx)
            gy = tl.where(c[28] == 0.0, 0.0, gy)
    if FORWARD or REVERSE:
        v = centred(d, x, y, c[0], c[1], EXACT)
        moved = _moved(v, tl.fma(of_x, per_x, -q), q, inv_t, series, ACCURATE, ROBUST)
        if POLICY:
            gx = moved if PLAIN and not ROBUST else moved * c[16]
            if REVERSE:
                gx = tl.fma(
                    p * c[17], _bounded(centred(d, x, y, c[2], c[3], EXACT) * inv_t, LARGEST), gx
                )
        if REFERENCE:
            gy = moved * c[20]
            if FORWARD:
                gy = tl.fma(
                    q * c[21], _bounded(centred(d, x, y, c[4], c[5], EXACT) * inv_t, LARGEST), gy
                )
    if POLICY and (MASS or MEAN or has(FIELDS, "entropy")):
        gx += _alone(p, x, c[8], c[9], c[10], c[18], c[19], inv_t, has(FIELDS, "entropy"))
        if MEAN:
            gx += tl.where(x == float("-inf"), 0.0, c[29])
    if REFERENCE and (REF_MASS or has(FIELDS, "ref_entropy")):
        gy += _alone(q, y, c[13], c[14], c[15], c[22], c[23], inv_t, has(FIELDS, "ref_entropy"))
    if CAP:
        return gx * slope_x, gy * slope_y
    else:
        return gx, gy


@triton.jit
def _load(row, begin, tokens, words, WORDS: tl.constexpr):
    """Tokens begin .. in fp32: even and odd ones, or all of them twice."""
    if WORDS:
        return load_words(row, begin, words)
    else:
        found = tl.load(row + (begin + tokens)).to(tl.float32)
        return found, found


@unspecialised
def gradients(
    policy, reference, policy_grad, reference_grad, constants, inv_temperature, kind, cap,
    n: tl.int64, inner: tl.int64, first: tl.int64, x_width: tl.int64, y_width: tl.int64,
    vocab: tl.int64, chunk: tl.int64, per_row: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64,
    gx_outer: tl.int64, gx_inner: tl.int64, gy_outer: tl.int64, gy_inner: tl.int64,
    FIELDS: tl.constexpr, POLICY: tl.constexpr, REFERENCE: tl.constexpr, CAP: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of rows first .. ; grid (rows, chunks). Logits from `vocab` on get exactly 0."""
    PAIR: tl.constexpr = (
        has(FIELDS, "forward_kl") or has(FIELDS, "reverse_kl") or family_of(FIELDS) != ""
    )
    NEEDS_X: tl.constexpr = POLICY or PAIR
    NEEDS_Y: tl.constexpr = REFERENCE or PAIR
    # with one term only, its coefficient may as well be in the weights
    PLAIN: tl.constexpr = only(FIELDS, "forward_kl") and not REFERENCE
    ACCURATE: tl.constexpr = (
        policy_grad.dtype.element_ty == tl.float32 or reference_grad.dtype.element_ty == tl.float32
    )
    # unpacking two tokens of a word costs less than one of a vector of tokens
    WORDS: tl.constexpr = (
        ALIGNED and not ACCURATE and ((not NEEDS_X) or is_half(policy))
        and ((not NEEDS_Y) or is_half(reference))
    )  # fmt: skip
    # a quarter: exact differences of a whole trip take three times the registers of the loop above
    TAIL: tl.constexpr = BLOCK // 4
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    begin = tl.program_id(1).to(tl.int64) * chunk
    x_size = tl.minimum(chunk, x_width - begin)
    y_size = tl.minimum(chunk, y_width - begin)
    size = tl.maximum(x_size if POLICY else 0, y_size if REFERENCE else 0)
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
        tl.load(column + 25 * n), tl.load(column + 26 * n), tl.load(column + 27 * n),
        tl.load(column + 28 * n), tl.load(column + 29 * n),
    )  # fmt: skip
    action = tl.load(column + (CONSTANTS - 1) * n)
    x_row = row_pointer(policy, local, inner, x_outer, x_inner) + begin
    y_row = row_pointer(reference, local, inner, y_outer, y_inner) + begin
    gx_row = row_pointer(policy_grad, local, inner, gx_outer, gx_inner) + begin
    gy_row = row_pointer(reference_grad, local, inner, gy_outer, gy_inner) + begin
    lane = tl.arange(0, BLOCK)
    word = tl.arange(0, BLOCK // 2)
    if ALIGNED:
        x_row = vectorised(x_row)
        y_row = vectorised(y_row)
        gx_row = vectorised(gx_row)
        gy_row = vectorised(gy_row)
    whole = tl.maximum(tl.minimum(size, vocab - begin), 0) // BLOCK * BLOCK
    series = gap_coefficients(inv_t)
    if action == 1.0:  # other rows, and the end of this one, take the loop below
        for i in tl.range(0, whole, BLOCK):
            x = (0.0, 0.0)
            y = (0.0, 0.0)
            if NEEDS_X:
                x = _load(x_row, i, lane, word, WORDS)
            if NEEDS_Y:
                y = _load(y_row, i, lane, word, WORDS)
            gx, gy = _token(
                x[0], y[0], c, inv_t, series, kind, cap,
                FIELDS, POLICY, REFERENCE, ACCURATE, PLAIN, False, CAP,
            )  # fmt: skip
            if WORDS:  # even tokens, and here the odd ones
                odd_x, odd_y = _token(
                    x[1], y[1], c, inv_t, series, kind, cap,
                    FIELDS, POLICY, REFERENCE, ACCURATE, PLAIN, False, CAP,
                )  # fmt: skip
                if POLICY:
                    gx = tl.reshape(tl.join(gx, odd_x), (BLOCK,))
                if REFERENCE:
                    gy = tl.reshape(tl.join(gy, odd_y), (BLOCK,))
            if POLICY:
                tl.store(gx_row + (i + lane), gx.to(policy_grad.dtype.element_ty))
            if REFERENCE:
                tl.store(gy_row + (i + lane), gy.to(reference_grad.dtype.element_ty))
    else:
        whole = whole * 0
    both = (action == 1.0) | (action == 3.0)
    read_x = tl.where(both | (action == 4.0) | (action == 5.0), vocab - begin, 0)
    read_y = tl.where(both | (action == 6.0) | (action == 7.0), vocab - begin, 0)
    rest = tl.arange(0, TAIL)
    fill_x = tl.where((action == 0.0) | (action == 6.0), 0.0, float("nan"))
    fill_y = tl.where((action == 0.0) | (action == 4.0), 0.0, float("nan"))
    for i in tl.range(whole, size, TAIL):
        real_x = i + rest < read_x
        real_y = i + rest < read_y
        x = 0.0
        y = 0.0
        if NEEDS_X:
            x = tl.load(x_row + (i + rest), mask=real_x, other=0.0).to(tl.float32)
        if NEEDS_Y:
            y = tl.load(y_row + (i + rest), mask=real_y, other=0.0).to(tl.float32)
        gx, gy = _token(
            x, y, c, inv_t, series, kind, cap,
            FIELDS, POLICY, REFERENCE, ACCURATE, PLAIN, True, CAP,
        )  # fmt: skip
        exists = begin + i + rest < vocab
        if POLICY:
            gx = tl.where(real_x, gx, tl.where(exists, fill_x, 0.0))
            tl.store(
                gx_row + (i + rest), gx.to(policy_grad.dtype.element_ty), mask=i + rest < x_size
            )
        if REFERENCE:
            gy = tl.where(real_y, gy, tl.where(exists, fill_y, 0.0))
            tl.store(
                gy_row + (i + rest), gy.to(reference_grad.dtype.element_ty), mask=i + rest < y_size
            )
