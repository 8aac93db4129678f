"""One sweep over a segment of one row: what logsumexp, entropy and log-probabilities need."""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import FAR, LOG2E, capped
from .layout import load_each, load_words, row_pointer, sum_in_order, unspecialised, vectorised
from .sweep import COLUMNS, mean_origin

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tile(state, x0, x1, slope, ENTROPY: tl.constexpr):
    """rest, gap [width] over tokens below the largest logit; that logit; how often it is there."""
    rest, gap, top, ties = state
    event = tl.max(tl.maximum(x0, x1), 0) >= top
    cold = tl.max(event.to(tl.int32), 0) > 0
    if cold:
        new_top = tl.maximum(top, tl.max(tl.maximum(x0, x1)))
        first = tl.arange(0, rest.shape[0]) == 0
        tie = tl.where(first, tl.where(new_top > top, ties, 0.0), 0.0)
        ties = tl.where(new_top > top, 0.0, ties)
        step = tl.minimum(new_top - top, FAR)
        factor = tl.exp2(-step * slope)
        rest += tie
        gap = factor * tl.fma(rest, step, gap)
        rest = factor * rest
        top = new_top
    down0 = top - x0
    down1 = top - x1
    w0 = tl.exp2(-down0 * slope)
    w1 = tl.exp2(-down1 * slope)
    if cold:
        ties += tl.sum((x0 == top).to(tl.float32) + (x1 == top).to(tl.float32))
        w0 = tl.where(x0 == top, 0.0, w0)
        w1 = tl.where(x1 == top, 0.0, w1)
    rest += tl.sum(w0 + w1, 0)
    if ENTROPY:
        gap += tl.sum(tl.fma(w0, tl.minimum(down0, FAR), w1 * tl.minimum(down1, FAR)), 0)
    return rest, gap, top, ties


@triton.jit
def _first_given(given, k, begin):
    """How many of k sorted ids are below `begin`."""
    found = begin * 0
    lane = tl.arange(0, 32)
    for j in range(0, k, 32):
        found += tl.sum((tl.load(given + j + lane, mask=j + lane < k, other=begin) < begin), 0)
    return found


@triton.jit
def _take_out(x0, x1, at0, at1, begin, end, given, k, index):
    """Two half tiles, -inf at the sorted ids below `end` from given[index] on, and the next."""
    token = tl.load(given + index, mask=index < k, other=end)
    while token < end:
        x0 = tl.where(at0 == token - begin, float("-inf"), x0)
        x1 = tl.where(at1 == token - begin, float("-inf"), x1)
        index += 1
        token = tl.load(given + index, mask=index < k, other=end)
    return x0, x1, index


@unspecialised
def sweep_single(
    policy, parts, inv_temperature, mask, given, cap,
    n: tl.int64, inner: tl.int64, first: tl.int64, vocab: tl.int64, segment: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, per_row: tl.int64, k: tl.int64,
    ENTROPY: tl.constexpr, GIVEN: tl.constexpr, MEAN: tl.constexpr, CAP: tl.constexpr,
    ALIGNED: tl.constexpr, WIDTH: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Columns of parts[segment, COLUMNS, n] of rows first ..; grid (rows, segments).

    GIVEN: without the tokens of given[n, k], sorted ids.
    """
    EXACT: tl.constexpr = policy.dtype.element_ty.primitive_bitwidth != 16
    HALF: tl.constexpr = HALVES * WIDTH
    local = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row = first + local
    if tl.load(mask + row * (per_row & 1), mask=(per_row & 1) != 0, other=1) == 0:
        return
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=(per_row & 2) != 0, other=1.0).to(tl.float32)
    slope = inv_t * LOG2E
    begin = part * segment
    size = tl.minimum(segment, vocab - begin)
    x_row = row_pointer(policy, local, inner, x_outer, x_inner) + begin
    zero = tl.zeros((WIDTH,), tl.float32)
    state = (zero, zero, inv_t * 0.0 + LOWEST, inv_t * 0.0)
    cell = tl.arange(0, HALVES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    even = cell if EXACT else cell * 2
    odd = even + (HALF if EXACT else 1)
    whole = size // (2 * HALF) * (2 * HALF)
    origin = mean_origin(x_row, cap, CAP)
    total = zero
    index = begin * 0
    if GIVEN:
        given += row * k
        index = _first_given(given, k, begin)
    if ALIGNED:
        x_row = vectorised(x_row)
    for i in tl.range(0, whole, 2 * HALF):
        if ALIGNED and not EXACT:
            x0, x1 = load_words(x_row, i, cell)
        else:
            x0 = tl.load(x_row + (i + even)).to(tl.float32)
            x1 = tl.load(x_row + (i + odd)).to(tl.float32)
        if CAP:
            x0 = capped(x0, cap)
            x1 = capped(x1, cap)
        if MEAN:
            total += tl.sum((x0 - origin) + (x1 - origin), 0)
        if GIVEN:
            end = begin + i + 2 * HALF
            x0, x1, index = _take_out(x0, x1, i + even, i + odd, begin, end, given, k, index)
        state = _tile(state, x0, x1, slope, ENTROPY)
    if whole < size:
        x0 = load_each(x_row, whole + even, size)
        x1 = load_each(x_row, whole + odd, size)
        if CAP:
            x0 = capped(x0, cap)
            x1 = capped(x1, cap)
        if MEAN:
            total += tl.sum(tl.where(whole + even < size, x0 - origin, 0.0), 0)
            total += tl.sum(tl.where(whole + odd < size, x1 - origin, 0.0), 0)
        if GIVEN:
            x0, x1, _ = _take_out(
                x0, x1, whole + even, whole + odd, begin, begin + size, given, k, index
            )
        state = _tile(state, x0, x1, slope, ENTROPY)
    rest, gap, top, ties = state
    out = parts + part * COLUMNS * n + row
    tl.store(out + n, sum_in_order(rest))
    tl.store(out + 5 * n, sum_in_order(gap))
    tl.store(out + 11 * n, top)
    tl.store(out + 12 * n, ties)
    if MEAN:
        tl.store(out + 14 * n, sum_in_order(total))
        tl.store(out + 15 * n, origin)
