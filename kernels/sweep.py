"""One sweep over a segment of two rows: sums about a centre that follows the heavy tokens.

A program is one warp with one segment of one row. Its running numbers:

    anchor, shift   weights are w = 2^(y slope + shift), slope = log2(e)/T, shift = -anchor slope:
                    an early large y, replaced when a token exceeds it by JUMP nats
    high, low       the centre c, the w-weighted mean of x - y over the tile the anchor is from
    s, sx           sum w,  sum w e^u                  (less the ties, where an entropy is wanted)
    a, b, c         sum w v,  sum w g(u),  sum w k(u)  (v = T u)
    hx, hy          sum w e^u log2(w e^u),  sum w log2(w)
    top, ties       the largest x, and how often: a peaked row's entropy is what is beside it
    reach           largest v: beyond FAREST nats a weight is no longer known well enough

Nothing large is subtracted anywhere, so small divergences keep their digits (row_math.h). A sum
that overflowed or met a token that one row lacks is not finite, and merge.py then sends the row to
careful.py. Tokens that both rows lack have weight 0.

Sums and products are fused where it says so and nowhere else, so that the code for aligned rows and
that for others round alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import (
    FAR,
    LOG2E,
    NEAR,
    capped,
    capped_difference,
    centred,
    difference,
    excess_mass,
    gap_coefficients,
    gap_polynomial,
    multiply_add,
)
from .layout import (
    is_half,
    load_each,
    load_words,
    row_pointer,
    sum_in_order,
    unspecialised,
    vectorised,
)

# What a segment leaves behind, one float each, for merge.py.
SUMS = (
    *("s", "sx", "a", "b", "c", "hx", "hy", "reach"),
    *("anchor", "high", "low", "top", "ties_x", "ties_y"),
    *("total", "origin"),  # sum of x - origin
)
COLUMNS = tl.constexpr(len(SUMS))
JUMP = tl.constexpr(1.0)
# A token that neither row has, in products with a weight of 0.
ABSENT = tl.constexpr(-1e34)


@triton.jit
def _more(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _most(a, b, ALIGNED: tl.constexpr):
    """The largest of the numbers in two half tiles, or NaN: [2, width] to [width].

    Or to one for each lane, [width / 4], where a lane holds four in a row.
    """
    first, second = tl.split(tl.trans(_more(a, b)))
    found = _more(first, second)
    if ALIGNED:
        first, second = tl.split(tl.reshape(found, (a.shape[1] // 2, 2)))
        first, second = tl.split(tl.reshape(_more(first, second), (a.shape[1] // 4, 2)))
        found = _more(first, second)
    return found


@triton.jit
def _apart(x, y, cap, CAP: tl.constexpr):
    """x - y and both logits, as the sums take them."""
    if CAP:
        return capped_difference(x, y, cap), capped(x, cap), capped(y, cap)
    else:
        return x - y, x, y


@triton.jit
def mean_origin(row, cap, CAP: tl.constexpr):
    """What logits are summed about: the first of the segment, if that is one."""
    found = tl.load(row).to(tl.float32)
    if CAP:
        found = capped(found, cap)
    return tl.where(tl.abs(found) < FAR, found, 0.0)


@triton.jit
def _terms(
    s, x, y, shift, high, low, inv_t, coefficients, REVERSE: tl.constexpr, EXACT: tl.constexpr
):
    """What one token adds to each sum; s = x - y."""
    slope = inv_t * LOG2E
    zy = multiply_add(y, slope, shift)
    wy = tl.exp2(zy)
    v = centred(s, x, y, high, low if EXACT else 0.0, EXACT)
    zx = multiply_add(v, slope, zy)
    wx = tl.exp2(zx)
    t = wy * v
    near = tl.abs(v) <= (1.0 / inv_t) * NEAR
    p = gap_polynomial(v, coefficients)
    b = tl.where(near, (t * v) * p, wx - tl.fma(t, inv_t, wy))
    c = b
    if REVERSE:
        below = tl.fma(v, inv_t, -1.0)
        c = tl.where(near, (t * v) * tl.fma(p, below, inv_t * inv_t), tl.fma(wx, below, wy))
    return wy, wx, v, t, b, c, zx, zy


@triton.jit
def _fresh(s0, x0, y0, s1, x1, y1, inv_t, EXACT: tl.constexpr):
    """Anchor and centre from one tile: its largest y, and the weighted mean of its s = x - y."""
    top = tl.max(tl.maximum(y0, y1))
    # the top token's own difference as origin makes a constant difference exactly 0
    high = tl.maximum(_own(s0, y0, top), _own(s1, y1, top))
    high = tl.max(high)
    high = tl.where(high > -FAR, high, 0.0)
    w0, t0 = _weighted(s0, x0, y0, top, high, inv_t, EXACT)
    w1, t1 = _weighted(s1, x1, y1, top, high, inv_t, EXACT)
    mean = sum_in_order(tl.sum(t0 + t1, 0)) / tl.maximum(sum_in_order(tl.sum(w0 + w1, 0)), 1e-30)
    if EXACT:
        return top, high, mean
    else:
        return top, high + mean, 0.0


@triton.jit
def _own(s, y, top):
    """s of tokens at the top."""
    return tl.where((tl.abs(s) < FAR) & (y == top), s, -FAR)


@triton.jit
def _weighted(s, x, y, top, high, inv_t, EXACT: tl.constexpr):
    """Weights of a tile's tokens, and their products with the difference from `high`."""
    seen = tl.abs(s) < FAR
    weight = tl.where(seen, tl.exp2((y - top) * (LOG2E * inv_t)), 0.0)
    return weight, weight * tl.where(seen, centred(s, x, y, high, 0.0, EXACT), 0.0)


@triton.jit
def top_exponent(top, anchor, high, low, slope, shift, EXACT: tl.constexpr):
    """log2 of the weight w e^u of the largest x."""
    below = difference(top, anchor, high, low if EXACT else 0.0, EXACT)
    return tl.fma(below, slope, tl.fma(anchor, slope, shift))


@triton.jit
def _tile(
    state, d0, d1, x0, y0, x1, y1, inv_t, coefficients,
    REVERSE: tl.constexpr, ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr, EXACT: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The running numbers after two half tiles [halves, width] more; sums are [width]."""
    s, sx, a, b, c, hx, hy, reach, anchor, shift, high, low, top, ties_x, ties_y = state
    slope = inv_t * LOG2E
    limit = anchor if REF_ENTROPY else anchor + (1.0 / inv_t) * JUMP
    far = _most(d0, d1, ALIGNED)
    larger_y = _most(y0, y1, ALIGNED)
    larger = larger_y >= limit if REF_ENTROPY else larger_y > limit
    if ENTROPY:
        larger = larger | (_most(x0, x1, ALIGNED) >= top)
    cold = tl.max((larger | (far != far)).to(tl.int32), 0) > 0
    if cold:
        # Tokens that neither row has: no difference, and where it matters finite without weight.
        none0 = (x0 == float("-inf")) & (y0 == float("-inf"))
        none1 = (x1 == float("-inf")) & (y1 == float("-inf"))
        d0 = tl.where(none0, 0.0, d0)
        d1 = tl.where(none1, 0.0, d1)
        if EXACT or ENTROPY or REF_ENTROPY:
            x0 = tl.where(none0, ABSENT, x0)
            x1 = tl.where(none1, ABSENT, x1)
            y0 = tl.where(none0, ABSENT, y0)
            y1 = tl.where(none1, ABSENT, y1)
        far = _most(tl.where(none0, -FAR, d0), tl.where(none1, -FAR, d1), ALIGNED)
        if tl.max(larger.to(tl.int32), 0) > 0:
            new_anchor, new_high, new_low = _fresh(d0, x0, y0, d1, x1, y1, inv_t, EXACT)
            jumped = new_anchor > anchor + (0.0 if REF_ENTROPY else (1.0 / inv_t) * JUMP)
            new_anchor = tl.where(jumped, new_anchor, anchor)
            new_high = tl.where(jumped, new_high, high)
            new_low = tl.where(jumped, new_low, low)
            new_shift = -new_anchor * slope
            kept_s = s
            kept_sx = sx
            if REF_ENTROPY:  # ties with what is no longer the largest go back to the rest
                tie_log = tl.fma(anchor, slope, shift)
                # in their columns, as excess_mass goes by column; before there is an anchor its
                # weight is no number
                tie = tl.where(ties_y > 0.0, ties_y * tl.exp2(tie_log), 0.0)
                s += tie
                kept_s = tl.where(jumped, s, kept_s)
                hy = tl.where(jumped, hy + tie * tie_log, hy)
                ties_y = tl.where(jumped, 0.0, ties_y)
            if ENTROPY:
                new_top = tl.maximum(top, tl.max(tl.maximum(x0, x1)))
                tie_log = top_exponent(top, anchor, high, low, slope, shift, EXACT)
                tie = tl.where(ties_x > 0.0, ties_x * tl.exp2(tie_log), 0.0)
                sx += tie
                higher = new_top > top
                kept_sx = tl.where(higher, sx, kept_sx)
                hx = tl.where(higher, hx + tie * tie_log, hx)
                ties_x = tl.where(higher, 0.0, ties_x)
                top = new_top
            # u becomes u - t and w becomes f w: what CentredSums::recentre does
            t = ((new_high - high) + (new_low - low)) * inv_t
            t = tl.where(anchor > -FAR, t, 0.0)
            step = new_shift - shift
            f = tl.exp2(step)
            e = tl.exp2(-t * LOG2E)
            small = tl.abs(t) <= NEAR
            g = t * t * gap_polynomial(-t, gap_coefficients(1.0))
            excess = g - t  # e^-t - 1
            moved = a - (t / inv_t) * s
            both = excess_mass(s, sx, a * inv_t, b)
            if REVERSE:
                k = t * t * gap_polynomial(t, gap_coefficients(1.0)) * e
                c = f * tl.where(
                    small,
                    c + excess * (both + c) + k * sx,
                    s + e * (c - s - t * sx),
                )
            b = f * tl.where(small, b + excess * both + g * s, e * sx - s - moved * inv_t)
            a = f * moved
            s = f * kept_s
            sx = (f * e) * kept_sx
            if REF_ENTROPY:
                hy = f * tl.fma(kept_s, step, hy)
            if ENTROPY:
                hx = (f * e) * tl.fma(kept_sx, step - t * LOG2E, hx)
            anchor = new_anchor
            shift = new_shift
            high = new_high
            low = new_low
    wy0, wx0, v0, _, b0, c0, zx0, zy0 = _terms(
        d0, x0, y0, shift, high, low, inv_t, coefficients, REVERSE, EXACT
    )
    wy1, wx1, _, t1, b1, c1, zx1, zy1 = _terms(
        d1, x1, y1, shift, high, low, inv_t, coefficients, REVERSE, EXACT
    )
    reach = tl.maximum(reach, far - high)
    a += tl.sum(tl.fma(wy0, v0, t1), 0)
    b += tl.sum(b0 + b1, 0)
    if REVERSE:
        c += tl.sum(c0 + c1, 0)
    if ENTROPY:
        if cold:
            # counted here: a block without a reduction would be turned into selects for every tile
            ties_x += tl.sum((x0 == top).to(tl.float32) + (x1 == top).to(tl.float32), 0)
            wx0 = tl.where(x0 == top, 0.0, wx0)
            wx1 = tl.where(x1 == top, 0.0, wx1)
        hx += tl.sum(tl.fma(wx0, zx0, wx1 * zx1), 0)
    if REF_ENTROPY:
        if cold:
            ties_y += tl.sum((y0 == anchor).to(tl.float32) + (y1 == anchor).to(tl.float32), 0)
            wy0 = tl.where(y0 == anchor, 0.0, wy0)
            wy1 = tl.where(y1 == anchor, 0.0, wy1)
        hy += tl.sum(tl.fma(wy0, zy0, wy1 * zy1), 0)
    s += tl.sum(wy0 + wy1, 0)
    sx += tl.sum(wx0 + wx1, 0)
    return s, sx, a, b, c, hx, hy, reach, anchor, shift, high, low, top, ties_x, ties_y


@unspecialised
def sweep_pair(
    policy, reference, parts, inv_temperature, mask, cap,
    n: tl.int64, inner: tl.int64, first: tl.int64, vocab: tl.int64, segment: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64, per_row: tl.int64,
    REVERSE: tl.constexpr, ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr,
    MEAN: tl.constexpr, CAP: tl.constexpr, ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """parts[segment, COLUMNS, n] of rows first.. ; grid (rows, segments), one warp each."""
    EXACT: tl.constexpr = not (is_half(policy) and is_half(reference))
    # of capped logits the difference is one float that knows itself to its last digits
    BOTH: tl.constexpr = EXACT and not CAP
    HALF: tl.constexpr = HALVES * WIDTH
    local = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row = first + local
    if tl.load(mask + row * (per_row & 1), mask=(per_row & 1) != 0, other=1) == 0:
        return
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=(per_row & 2) != 0, other=1.0).to(tl.float32)
    begin = part * segment
    size = tl.minimum(segment, vocab - begin)
    x_row = row_pointer(policy, local, inner, x_outer, x_inner) + begin
    y_row = row_pointer(reference, local, inner, y_outer, y_inner) + begin
    coefficients = gap_coefficients(inv_t)
    zero = tl.zeros((WIDTH,), tl.float32)
    reach = tl.zeros((WIDTH // 4 if ALIGNED else WIDTH,), tl.float32) - FAR
    nothing = inv_t * 0.0
    anchor = nothing - FAR
    state = (
        zero, zero, zero, zero, zero, zero, zero, reach,
        anchor, inv_t * LOG2E * FAR, nothing, nothing, anchor, zero, zero,
    )  # fmt: skip
    cell = tl.arange(0, HALVES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = size // (2 * HALF) * (2 * HALF)
    origin = mean_origin(x_row, cap, CAP)
    total = zero
    # Tiles are the same tokens in the same columns either way: the sums do not depend on alignment.
    even = cell if EXACT else cell * 2
    odd = even + (HALF if EXACT else 1)
    if ALIGNED:
        x_row = vectorised(x_row)
        y_row = vectorised(y_row)
    for i in tl.range(0, whole, 2 * HALF):
        if ALIGNED and not EXACT:
            x0, x1 = load_words(x_row, i, cell)
            y0, y1 = load_words(y_row, i, cell)
        else:
            x0 = tl.load((x_row + i) + even).to(tl.float32)
            x1 = tl.load((x_row + i) + odd).to(tl.float32)
            y0 = tl.load((y_row + i) + even).to(tl.float32)
            y1 = tl.load((y_row + i) + odd).to(tl.float32)
        d0, x0, y0 = _apart(x0, y0, cap, CAP)
        d1, x1, y1 = _apart(x1, y1, cap, CAP)
        if MEAN:
            total += tl.sum((x0 - origin) + (x1 - origin), 0)
        state = _tile(
            state, d0, d1, x0, y0, x1, y1, inv_t, coefficients,
            REVERSE, ENTROPY, REF_ENTROPY, BOTH, ALIGNED,
        )  # fmt: skip
    if whole < size:
        x0 = load_each(x_row, whole + even, size)
        x1 = load_each(x_row, whole + odd, size)
        y0 = load_each(y_row, whole + even, size)
        y1 = load_each(y_row, whole + odd, size)
        d0, x0, y0 = _apart(x0, y0, cap, CAP)
        d1, x1, y1 = _apart(x1, y1, cap, CAP)
        if MEAN:
            total += tl.sum(tl.where(whole + even < size, x0 - origin, 0.0), 0)
            total += tl.sum(tl.where(whole + odd < size, x1 - origin, 0.0), 0)
        state = _tile(
            state, d0, d1, x0, y0, x1, y1, inv_t, coefficients,
            REVERSE, ENTROPY, REF_ENTROPY, BOTH, ALIGNED,
        )  # fmt: skip
    s, sx, a, b, c, hx, hy, reach, anchor, _, high, low, top, ties_x, ties_y = state
    out = parts + part * COLUMNS * n + row
    tl.store(out, sum_in_order(s))
    tl.store(out + n, sum_in_order(sx))
    tl.store(out + 2 * n, sum_in_order(a))
    tl.store(out + 3 * n, sum_in_order(b))
    tl.store(out + 4 * n, sum_in_order(c))
    tl.store(out + 5 * n, sum_in_order(hx))
    tl.store(out + 6 * n, sum_in_order(hy))
    tl.store(out + 7 * n, tl.max(reach, 0))
    tl.store(out + 8 * n, anchor)
    tl.store(out + 9 * n, high)
    tl.store(out + 10 * n, low)
    tl.store(out + 11 * n, top)
    tl.store(out + 12 * n, sum_in_order(ties_x))
    tl.store(out + 13 * n, sum_in_order(ties_y))
    if MEAN:
        tl.store(out + 14 * n, sum_in_order(total))
        tl.store(out + 15 * n, origin)
