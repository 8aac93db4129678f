"""From the sums of a row's segments to its RowState and values: one lane per row, in float64.

A row whose sums cannot vouch for their digits is flagged for careful.py, on the device: the flag is
the last plane of `parts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formulas import (
    FAR,
    LN2,
    LOG2E,
    capped,
    difference_too_coarse,
    excess_mass,
    forward_from_sums,
    log1p,
    merge,
    reverse_from_sums,
)
from .layout import is_half, row_pointer, unspecialised
from .state import (
    STATE_COLUMNS,
    empty,
    family_of,
    has,
    is_of_second_sweep,
    is_of_tokens,
    load_state,
    select,
    without_mass,
)
from .sweep import COLUMNS, top_exponent

# |u| beyond which the exponent of a weight is no longer exact enough.
FAREST = tl.constexpr(40.0)


@triton.jit
def value_of(state, mean, FIELD: tl.constexpr):
    """A field of one number per row, from its RowState; mean of x/T over the vocabulary."""
    p_max, p_sum, q_max, q_sum, _, _, forward, reverse, entropy, reference_entropy = state
    if FIELD == "forward_kl":
        return forward
    elif FIELD == "reverse_kl":
        return reverse
    elif FIELD == "entropy":
        return entropy
    elif FIELD == "ref_entropy":
        return reference_entropy
    elif FIELD == "logsumexp":
        return p_max + p_sum
    elif FIELD == "mean_logprob":
        return (mean - p_max) - p_sum
    else:
        tl.static_assert(FIELD == "ref_logsumexp", "unknown field")
        return q_max + q_sum


@triton.jit
def token_logit(row, token, read, cap, CAP: tl.constexpr):
    found = tl.load(row + token, mask=read, other=0.0).to(tl.float64)
    return capped(found, cap) if CAP else found


@triton.jit
def store_tokens_of(
    out, state, x_row, y_row, token_ids, row, counted, live, n, k, vocab, inv_t, cap,
    FIELD: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """A field of every token asked for of a row, n apart: 0 for an id of -1, NaN for one beyond."""
    for j in range(k):
        token = tl.load(token_ids + row * k + j, mask=live, other=-1)
        inside = (token >= 0) & (token < vocab)
        read = live & counted & inside
        if FIELD == "logprob":
            x = token_logit(x_row, token, read, cap, CAP)
            found = (x * inv_t - state[0]) - state[1]
        elif FIELD == "ref_logprob":
            y = token_logit(y_row, token, read, cap, CAP)
            found = (y * inv_t - state[2]) - state[3]
        else:
            x = token_logit(x_row, token, read, cap, CAP)
            y = token_logit(y_row, token, read, cap, CAP)
            found = ((x - y) - state[4]) * inv_t - state[5]
        found = tl.where(inside, found, float("nan"))
        found = tl.where((token == -1) | (counted == 0), 0.0, found)
        tl.store(out + j * n, found.to(out.dtype.element_ty), mask=live)


@triton.jit
def store_row(
    state, row, counted, live, values, states, x_row, y_row, token_ids, n, k, vocab, inv_t, cap,
    whole, logit_sum, tokens, FIELDS: tl.constexpr, PAIR: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The state and the values, in the order of FIELDS, of rows (a vector of them, or one).

    The state of a row without mass says so, as it may be a slice of a longer row; its values
    are NaN.
    """
    out = states + row * STATE_COLUMNS
    for i in tl.static_range(10):
        tl.store(out + i, tl.where(counted, state[i], 0.0), mask=live)
    tl.store(out + 10, whole, mask=live)
    tl.store(out + 11, tl.where(counted, logit_sum, 0.0), mask=live)
    tl.store(out + 12, tl.where(counted, tokens, 0.0), mask=live)
    for i in tl.static_range(13, STATE_COLUMNS):
        tl.store(out + i, 0.0, mask=live)
    state = without_mass(state, PAIR)
    at = values + row
    rows = (token_ids, row, counted, live, n, k, vocab, inv_t, cap)
    for i in tl.static_range(len(FIELDS)):
        if is_of_tokens(FIELDS[i]):
            store_tokens_of(at, state, x_row, y_row, *rows, FIELDS[i], CAP)
            at += k * n
        elif is_of_second_sweep(FIELDS[i]):  # its value comes from second_sweep.py
            at += n
        else:
            found = tl.where(counted, value_of(state, logit_sum / tokens, FIELDS[i]), 0.0)
            tl.store(at, found.to(values.dtype.element_ty), mask=live)
            at += n


@triton.jit
def _pair_state(
    sums, n, inv32, inv_t, live,
    REVERSE: tl.constexpr, ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """RowState of one segment, and whether it must be computed with care."""
    slope = inv32 * LOG2E
    s32 = tl.load(sums, mask=live, other=0.0)
    sx32 = tl.load(sums + n, mask=live, other=0.0)
    a = tl.load(sums + 2 * n, mask=live, other=0.0).to(tl.float64) * inv32
    b = tl.load(sums + 3 * n, mask=live, other=0.0).to(tl.float64)
    c = tl.load(sums + 4 * n, mask=live, other=0.0).to(tl.float64)
    hx = tl.load(sums + 5 * n, mask=live, other=0.0).to(tl.float64)
    hy = tl.load(sums + 6 * n, mask=live, other=0.0).to(tl.float64)
    reach = tl.load(sums + 7 * n, mask=live, other=0.0)
    anchor = tl.load(sums + 8 * n, mask=live, other=0.0)
    high = tl.load(sums + 9 * n, mask=live, other=0.0)
    low = tl.load(sums + 10 * n, mask=live, other=0.0)
    top = tl.load(sums + 11 * n, mask=live, other=0.0)
    ties_x = tl.load(sums + 12 * n, mask=live, other=0.0).to(tl.float64)
    ties_y = tl.load(sums + 13 * n, mask=live, other=0.0).to(tl.float64)
    shift = -anchor * slope
    # what the rounding of the shift did to every weight, log2
    common = anchor.to(tl.float64) * slope + shift
    s = s32.to(tl.float64)
    rest_y = s * tl.exp(-common * LN2)
    if REF_ENTROPY:
        s = (rest_y + ties_y) * tl.exp(common * LN2)
    total_x = sx32.to(tl.float64)
    if ENTROPY:
        log_top = top_exponent(top, anchor, high, low, slope, shift, EXACT).to(tl.float64)
        weight = tl.exp(log_top * LN2)
        rest = total_x / weight
        total_x += ties_x * weight
    m = excess_mass(s, total_x, a, b)
    found = (s32 > 0.0) | (ties_y > 0.0)
    safe = tl.where(found, s, 1.0)
    z = m / safe
    centre = high.to(tl.float64) + low
    residual = log1p(z)
    q_max = anchor.to(tl.float64) * inv_t
    q_sum = tl.log(safe) - common * LN2
    p_max = q_max + centre * inv_t
    p_sum = q_sum + residual
    forward = forward_from_sums(safe, a, b, m)
    reverse = forward  # where it was not asked for (RowState of row_math.h)
    entropy = forward * 0.0
    reference_entropy = forward * 0.0
    if REVERSE:
        reverse = reverse_from_sums(safe, c, m)
    if ENTROPY:
        mass = ties_x + rest
        p_max = top.to(tl.float64) * inv_t
        p_sum = tl.where(ties_x == 1.0, log1p(rest), tl.log(mass))
        entropy = p_sum + (log_top * total_x - log_top * ties_x * weight - hx) * LN2 / (
            weight * mass
        )
    if REF_ENTROPY:
        mass = ties_y + rest_y
        q_sum = tl.where(ties_y == 1.0, log1p(rest_y), tl.log(mass))
        gap = (common * rest_y - hy * tl.exp(-common * LN2)) * LN2
        reference_entropy = q_sum + gap / mass
    # absolute, or large ones would cancel
    checked = tl.abs(a) + tl.abs(b) + tl.abs(c) + tl.abs(hx) + tl.abs(hy)
    checked += s + total_x + tl.abs(residual) + tl.abs(anchor) * 1e-20
    careful = (checked < 1e37) == 0
    careful = careful | (reach * inv32 > FAREST)
    careful = careful | (inv32 > 1e5) | (inv32 < 1e-5)
    # what was added against what is left (certificates of segment.h)
    equal = (a == 0.0) & (b == 0.0)
    small = b < 1e-14 * s
    careful = careful | ((equal == 0) & (small == 0) & (b > 8.0 * total_x * forward))
    if REVERSE:
        careful = careful | ((equal == 0) & (small == 0) & (c > 10.0 * total_x * reverse))
    if not EXACT:  # a centre that one float does not hold
        # Of the smaller divergence, as row_math.h has it. Where that was not asked for, one beyond
        # what rows come to is that of a few tokens that the policy hardly has.
        least = tl.minimum(forward, reverse) if REVERSE else tl.where(forward > 100.0, 0.0, forward)
        coarse = difference_too_coarse(centre * inv_t, least)
        careful = careful | ((equal | (small == 0)) & coarse)
    # neither row has a token here
    none = (found == 0) & (total_x == 0.0) & (reach <= -FAR)
    careful = (careful | (found == 0)) & (none == 0)
    state = (
        p_max, p_sum, q_max, q_sum, centre, residual, forward, reverse, entropy, reference_entropy
    )  # fmt: skip
    return select(none, empty(forward), state), careful


@triton.jit
def single_state(sums, n, inv_t, live):
    """RowState of one segment of the policy alone (single.py)."""
    rest = tl.load(sums + n, mask=live, other=0.0).to(tl.float64)
    gap = tl.load(sums + 5 * n, mask=live, other=0.0).to(tl.float64)
    top = tl.load(sums + 11 * n, mask=live, other=0.0).to(tl.float64)
    ties = tl.load(sums + 12 * n, mask=live, other=0.0).to(tl.float64)
    mass = ties + rest
    log_sum = tl.where(ties == 1.0, log1p(rest), tl.log(mass))
    nothing = empty(rest)
    nan = tl.where((rest != rest) | (top == float("inf")), float("nan"), 0.0)
    state = (
        top * inv_t + nan, log_sum + nan, nothing[2], nothing[2], nothing[4], nothing[5],
        nothing[6], nothing[7], log_sum + gap * inv_t / mass + nan, nothing[9],
    )  # fmt: skip
    return select((mass == 0.0) & (rest == rest), nothing, state)


@unspecialised
def finish(
    policy, reference, parts, inv_temperature, mask, token_ids, values, states, cap: tl.float64,
    n: tl.int64, k: tl.int64, inner: tl.int64, first: tl.int64, rows: tl.int64, vocab: tl.int64,
    segment: tl.int64, per_row: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64,
    FIELDS: tl.constexpr, PAIR: tl.constexpr, CAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """states[n, STATE_COLUMNS], values[R, n] of `rows` rows from `first`; LANES a program."""
    REVERSE: tl.constexpr = has(FIELDS, "reverse_kl")
    ENTROPY: tl.constexpr = has(FIELDS, "entropy")
    REF_ENTROPY: tl.constexpr = has(FIELDS, "ref_entropy")
    EXACT: tl.constexpr = not (is_half(policy) and is_half(reference))
    local = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = local < rows
    row = first + local
    counted = tl.load(mask + row, mask=live & ((per_row & 1) != 0), other=1) != 0
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=live & ((per_row & 2) != 0), other=1.0)
    inv_t = inv_t.to(tl.float64)
    state = empty(inv_t)
    careful = live & (counted == 0) & counted
    segments = (vocab + segment - 1) // segment
    highest = inv_t * 0.0 - float("inf")
    logit_sum = inv_t * 0.0
    tokens = inv_t * 0.0
    for i in range(segments):
        sums = parts + i * COLUMNS * n + row
        if PAIR:
            inv32 = inv_t.to(tl.float32)
            part, unsure = _pair_state(
                sums, n, inv32, inv_t, live, REVERSE, ENTROPY, REF_ENTROPY, EXACT and not CAP
            )
            careful = careful | unsure
        else:
            part = single_state(sums, n, inv_t, live)
        own = tl.where(part[1] > float("-inf"), part[4] * inv_t + part[5], -float("inf"))
        highest = tl.maximum(highest, own)
        if has(FIELDS, "mean_logprob"):
            origin = tl.load(sums + 15 * n, mask=live, other=0.0).to(tl.float64)
            size = tl.minimum(segment, vocab - i * segment)
            logit_sum += tl.load(sums + 14 * n, mask=live, other=0.0) + origin * size
            tokens += size
        # the first one as it is: merging with nothing would lose a NaN
        state = select((i == 0) | (inv_t != inv_t), part, merge(state, part, inv_t))
    if family_of(FIELDS) != "":
        # a second sweep goes by the row's log-ratio, and reaches no further
        careful = careful | (highest - (state[4] * inv_t + state[5]) > FAREST)
    tl.store(parts + segments * COLUMNS * n + row, (careful & counted).to(tl.float32), mask=live)
    x_row = row_pointer(policy, local, inner, x_outer, x_inner)
    y_row = row_pointer(reference, local, inner, y_outer, y_inner)
    store_row(
        state, row, counted, live, values, states, x_row, y_row, token_ids, n, k, vocab, inv_t, cap,
        1.0, logit_sum * inv_t, tokens, FIELDS, PAIR, CAP,
    )  # fmt: skip


@unspecialised
def merge_rows(
    parts, inv_temperature, values, states,
    n: tl.int64, count: tl.int64, per_row: tl.int64,
    FIELDS: tl.constexpr, PAIR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """states[n, STATE_COLUMNS] and values[R, n] of rows whose slices are parts[count, n, ..]."""
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = row < n
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=live & ((per_row & 2) != 0), other=1.0)
    inv_t = inv_t.to(tl.float64)
    state = load_state(parts, row, live)
    for i in range(1, count):
        state = merge(state, load_state(parts + i * n * STATE_COLUMNS, row, live), inv_t)
    whole = tl.load(parts + row * STATE_COLUMNS + 10, mask=live & (count == 1), other=0.0)
    logit_sum = inv_t * 0.0
    tokens = inv_t * 0.0
    for i in range(count):
        slice_state = parts + (i * n + row) * STATE_COLUMNS
        logit_sum += tl.load(slice_state + 11, mask=live, other=0.0)
        tokens += tl.load(slice_state + 12, mask=live, other=0.0)
    store_row(
        state, row, live, live, values, states, values, values, values, n, 0, 0, inv_t, 1.0, whole,
        logit_sum, tokens, FIELDS, PAIR, False,
    )  # fmt: skip
