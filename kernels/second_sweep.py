"""The second sweep over two rows, given their states: sums of the terms of family.py.

As the first: a warp takes a segment of a row, a lane per row adds the segments up, and rows whose
sums will not do are taken again in float64. Those are the rows that the first sweep flagged (all
that has tokens of one side only, or far from the other one), and any that comes out not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .careful import load_exact
from .family import expm1_near, family_sums, family_terms, family_value, farthest, tilted_log
from .formulas import FAR, LN2, LOG2E, capped, capped_difference, difference, log1p
from .layout import is_half, load_rest, load_wide, row_pointer, unspecialised, vectorised
from .state import STATE_COLUMNS, load_state

SUMS = tl.constexpr(4)
# Nats beyond which a token's weight is not known well enough; the first sweep flags its row.
BOUND = tl.constexpr(80.0)


@triton.jit
def _token(
    x, y, hi, lo, shift, inv_t, kind, cap,
    FIELD: tl.constexpr, EXACT: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """q but for its common factor, what it multiplies in four sums, and how far tokens are."""
    slope = inv_t * LOG2E
    if CAP:
        v = capped_difference(x, y, cap) - hi
        y = capped(y, cap)
    else:
        v = difference(x, y, hi, 0.0, EXACT)
    # a token that neither row has: NaN, weight 0
    l = tl.minimum(tl.fma(v, slope, -(lo * slope)), BOUND * LOG2E)  # noqa: E741
    q = tl.exp2(tl.fma(y, slope, shift))
    a, b, c, d = family_terms(tl.exp2(l), 1.0, l, kind, FIELD)
    return q, a, b, c, d, v


@unspecialised
def sweep_family(
    policy, reference, parts, flags, states, inv_temperature, mask, kind, cap,
    n: tl.int64, inner: tl.int64, first: tl.int64, vocab: tl.int64, segment: tl.int64,
    per_row: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64,
    FIELD: tl.constexpr, SLICE: tl.constexpr, CAP: tl.constexpr, ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """parts[segment, SUMS, n] of rows first ..; grid (rows, segments), one warp each.

    SLICE: no first sweep has looked at these very tokens.
    """
    EXACT: tl.constexpr = not (is_half(policy) and is_half(reference))
    HALF: tl.constexpr = HALVES * WIDTH
    local = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row = first + local
    if tl.load(mask + row * (per_row & 1), mask=(per_row & 1) != 0, other=1) == 0:
        return
    if tl.load(flags + row) != 0.0:
        return
    at = tl.where((per_row & 4) != 0, row, 0)
    inverse = tl.load(inv_temperature + at, mask=(per_row & 2) != 0, other=1.0).to(tl.float64)
    inv_t = inverse.to(tl.float32)
    state = load_state(states, row, row >= 0)
    ratio = state[4] + state[5] / inverse
    hi = ratio.to(tl.float32)
    lo = (ratio - hi).to(tl.float32)
    exponent = state[2] / inverse * (inv_t * LOG2E)
    shift = -exponent.to(tl.float32)
    # what the rounding of the shift took from every weight
    weight = tl.exp((-shift - exponent) * LN2 - state[3])
    begin = part * segment
    size = tl.minimum(segment, vocab - begin)
    x_row = row_pointer(policy, local, inner, x_outer, x_inner) + begin
    y_row = row_pointer(reference, local, inner, y_outer, y_inner) + begin
    if ALIGNED:
        x_row = vectorised(x_row)
        y_row = vectorised(y_row)
    a = tl.zeros((HALVES, WIDTH), tl.float32)
    b = tl.zeros((HALVES, WIDTH), tl.float32)
    c = tl.zeros((HALVES, WIDTH), tl.float32)
    d = tl.zeros((HALVES, WIDTH), tl.float32)
    reach = tl.zeros((WIDTH,), tl.float32)
    cell = tl.arange(0, HALVES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = size // (2 * HALF) * (2 * HALF)
    for i in tl.range(0, whole, 2 * HALF):
        x0, x1 = load_wide(x_row, i, cell, HALF, EXACT, ALIGNED)
        y0, y1 = load_wide(y_row, i, cell, HALF, EXACT, ALIGNED)
        q0, a0, b0, c0, d0, v0 = _token(x0, y0, hi, lo, shift, inv_t, kind, cap, FIELD, EXACT, CAP)
        q1, a1, b1, c1, d1, v1 = _token(x1, y1, hi, lo, shift, inv_t, kind, cap, FIELD, EXACT, CAP)
        a = tl.fma(q1, a1, tl.fma(q0, a0, a))
        b = tl.fma(q1, b1, tl.fma(q0, b0, b))
        c = tl.fma(q1, c1, tl.fma(q0, c0, c))
        d = tl.fma(q1, d1, tl.fma(q0, d0, d))
        if SLICE:
            reach = tl.maximum(reach, tl.max(tl.maximum(v0, v1), 0))
    if whole < size:
        x0, x1 = load_rest(x_row, whole, cell, HALF, EXACT, size)
        y0, y1 = load_rest(y_row, whole, cell, HALF, EXACT, size)
        q0, a0, b0, c0, d0, v0 = _token(x0, y0, hi, lo, shift, inv_t, kind, cap, FIELD, EXACT, CAP)
        q1, a1, b1, c1, d1, v1 = _token(x1, y1, hi, lo, shift, inv_t, kind, cap, FIELD, EXACT, CAP)
        a = tl.fma(q1, a1, tl.fma(q0, a0, a))
        b = tl.fma(q1, b1, tl.fma(q0, b0, b))
        c = tl.fma(q1, c1, tl.fma(q0, c0, c))
        d = tl.fma(q1, d1, tl.fma(q0, d0, d))
        if SLICE:
            reach = tl.maximum(reach, tl.max(tl.maximum(v0, v1), 0))
    beyond = (inv_t > 1e5) | (inv_t < 1e-5) | (tl.abs(hi) > FAR) | (tl.abs(shift) > FAR)
    beyond = beyond | (tl.max(reach, 0) * inv_t > BOUND)
    weight += tl.where(beyond, float("nan"), 0.0)
    out = parts + part * SUMS * n + row
    tl.store(out, (tl.sum(a) * weight).to(tl.float32))
    tl.store(out + n, (tl.sum(b) * weight).to(tl.float32))
    tl.store(out + 2 * n, (tl.sum(c) * weight).to(tl.float32))
    tl.store(out + 3 * n, (tl.sum(d) * weight).to(tl.float32))


@triton.jit
def _store(
    out, values, states, row, counted, live, sums, log_kept, kind, n, line,
    FIELD: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """[3] of rows of `out`; or, of whole rows, their value and the last columns of the state."""
    a, b, c, d = sums
    total, policy_slope, reference_slope = family_sums(a, b, c, d, FIELD)
    if SLICE:
        tl.store(out + row * 3, tl.where(counted, total, 0.0), mask=live)
        tl.store(out + row * 3 + 1, tl.where(counted, policy_slope, 0.0), mask=live)
        tl.store(out + row * 3 + 2, tl.where(counted, reference_slope, 0.0), mask=live)
    else:
        at = states + row * STATE_COLUMNS
        forward_kl = tl.load(at + 6, mask=live, other=0.0)
        # no number of the pair where a side is no distribution: a log-ratio of NaN or infinity, or
        # neither row with a token
        known = tl.abs(tl.load(at + 5, mask=live, other=0.0)) < float("inf")
        known = known & (tl.load(at + 1, mask=live, other=0.0) > float("-inf"))
        found = family_value(a, b, c, d, log_kept, kind[1], forward_kl, FIELD)
        found = tl.where(known, found, float("nan"))
        found = tl.where(counted, found, 0.0)
        tl.store(at + 13, found, mask=live)
        tl.store(at + 14, tl.where(counted, policy_slope, 0.0), mask=live)
        tl.store(at + 15, tl.where(counted, reference_slope, 0.0), mask=live)
        tl.store(values + line * n + row, found.to(values.dtype.element_ty), mask=live)


@unspecialised
def finish_family(
    parts, flags, out, values, states, mask, kind,
    n: tl.int64, first: tl.int64, rows: tl.int64, segments: tl.int64, line: tl.int64,
    per_row: tl.int64,
    FIELD: tl.constexpr, SLICE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adds the segments of `rows` rows from `first` up; LANES a program."""
    local = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = local < rows
    row = first + local
    counted = tl.load(mask + row, mask=live & ((per_row & 1) != 0), other=1) != 0
    flagged = tl.load(flags + row, mask=live, other=0.0) != 0.0
    a = tl.zeros((LANES,), tl.float64)
    b = tl.zeros((LANES,), tl.float64)
    c = tl.zeros((LANES,), tl.float64)
    d = tl.zeros((LANES,), tl.float64)
    for i in range(segments):
        at = parts + i * SUMS * n + row
        a += tl.load(at, mask=live, other=0.0)
        b += tl.load(at + n, mask=live, other=0.0)
        c += tl.load(at + 2 * n, mask=live, other=0.0)
        d += tl.load(at + 3 * n, mask=live, other=0.0)
    flagged = flagged | ((tl.abs(a + b + c + d) < FAR) == 0)
    if FIELD == "tvd" and not SLICE:  # both sides of p = q are one number
        flagged = flagged | (tl.abs(a - b) > 1e-5 * (a + b))
    tl.store(flags + row, (flagged & counted).to(tl.float32), mask=live)
    sums = (a, b, c, d)
    _store(
        out, values, states, row, counted, live, sums, tl.log(b), kind, n, line, FIELD, SLICE
    )  # fmt: skip


@triton.jit
def _distribution(row, offsets, vocab, largest, log_sum, inv_t, cap, CAP: tl.constexpr):
    """Logits and probabilities in float64; -inf and 0 beyond the row."""
    found = load_exact(row, offsets, vocab, cap, CAP)
    return found, tl.exp((found * inv_t - largest) - log_sum)


@triton.jit
def log_ratio(x, y, state, inv_t, FIELD: tl.constexpr):
    """l in float64, `farthest` where one side has no token; 0 where neither has."""
    most: tl.constexpr = farthest(FIELD)
    absent_x = x == float("-inf")
    absent_y = y == float("-inf")
    far = tl.where(absent_x, tl.where(absent_y, 0.0, -most), tl.where(absent_y, most, 0.0))
    here = (absent_x == 0) & (absent_y == 0)
    l = tl.where(here, ((x - y) - state[4]) * inv_t - state[5], far)  # noqa: E741
    return tl.maximum(tl.minimum(l, most), -most)


@triton.jit
def _tilted_log(x, y, l, state, inv_t, kind):  # noqa: E741
    """log of q^beta p^rest in float64."""
    largest = tl.where(
        l > 0.0, (x * inv_t - state[0]) - state[1], (y * inv_t - state[2]) - state[3]
    )
    return largest + tilted_log(l, kind[0], kind[1])


@unspecialised
def careful_family(
    policy, reference, flags, out, values, states, inv_temperature, kind,
    cap: tl.float64, n: tl.int64, inner: tl.int64, first: tl.int64, vocab: tl.int64, line: tl.int64,
    per_row: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64,
    FIELD: tl.constexpr, SLICE: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `finish_family` stores, of the flagged rows among first ..; grid (rows,)."""
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    if tl.load(flags + row) == 0.0:
        return
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=(per_row & 2) != 0, other=1.0).to(tl.float64)
    state = load_state(states, row, row >= 0)
    x_row = row_pointer(policy, local, inner, x_outer, x_inner)
    y_row = row_pointer(reference, local, inner, y_outer, y_inner)
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float64)
    mended = state[5] * 0.0
    if not SLICE:  # what p and q lack of one sum, the log-ratio of their normalisers is off by
        apart = zero
        excess = zero
        for i in tl.range(0, vocab, BLOCK):
            x, p = _distribution(x_row, i + lane, vocab, state[0], state[1], inv_t, cap, CAP)
            y, q = _distribution(y_row, i + lane, vocab, state[2], state[3], inv_t, cap, CAP)
            l = log_ratio(x, y, state, inv_t, FIELD)  # noqa: E741
            close = tl.abs(l) <= 0.5
            moved = tl.where(close, q * expm1_near(tl.where(close, l, 0.0)), p - q)
            apart += tl.abs(moved)
            excess += moved
        over = tl.sum(excess, 0)
        off = (tl.abs(over) > 1e-9 * tl.sum(apart, 0)) & (tl.abs(over) < 0.1)
        mended = tl.where(off, log1p(tl.where(off, over, 0.0)), 0.0)
        tl.store(states + row * STATE_COLUMNS + 5, state[5] + mended)
    a = zero
    b = zero
    c = zero
    d = zero
    for i in tl.range(0, vocab, BLOCK):
        x, p = _distribution(x_row, i + lane, vocab, state[0], state[1], inv_t, cap, CAP)
        y, q = _distribution(y_row, i + lane, vocab, state[2], state[3], inv_t, cap, CAP)
        l = log_ratio(x, y, state, inv_t, FIELD)  # noqa: E741
        here = (x != float("-inf")) & (y != float("-inf"))
        l = tl.where(here, l - mended, l)  # noqa: E741
        a0, b0, c0, d0 = family_terms(p, q, l * LOG2E, kind, FIELD)
        a += a0
        b += b0
        c += c0
        d += d0
    sums = (tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0))
    log_kept = tl.log(sums[1])
    if FIELD == "renyi" and not SLICE:
        in_range = (sums[1] > 1e-290) & (sums[1] < float("inf"))
        if in_range == 0:  # once more, about the largest term
            top = zero + float("-inf")
            for i in tl.range(0, vocab, BLOCK):
                x = load_exact(x_row, i + lane, vocab, cap, CAP)
                y = load_exact(y_row, i + lane, vocab, cap, CAP)
                l = log_ratio(x, y, state, inv_t, FIELD)  # noqa: E741
                top = tl.maximum(top, _tilted_log(x, y, l, state, inv_t, kind))
            most = tl.max(top, 0)
            kept = zero
            for i in tl.range(0, vocab, BLOCK):
                x = load_exact(x_row, i + lane, vocab, cap, CAP)
                y = load_exact(y_row, i + lane, vocab, cap, CAP)
                l = log_ratio(x, y, state, inv_t, FIELD)  # noqa: E741
                u = _tilted_log(x, y, l, state, inv_t, kind)
                kept += tl.where(u > float("-inf"), tl.exp(u - most), 0.0)
            log_kept = most + tl.log(tl.sum(kept, 0))
    yes = vocab > 0
    _store(out, values, states, row, yes, yes, sums, log_kept, kind, n, line, FIELD, SLICE)
