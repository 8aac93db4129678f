"""Rows whose one-sweep sums would not do, in float64: three reads, every value and support exact.

Tokens that only one row has, weights hundreds of nats apart, logits near the end of float. Every
program looks at its row's flag first; nearly all return there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import store_row
from .formulas import capped, kl_terms, log1p
from .layout import row_pointer, unspecialised
from .state import STATE_COLUMNS, family_of, with_nan
from .sweep import COLUMNS

# Tokens of a trip: float64, so few values a thread.
CAREFUL_BLOCK = 512


@triton.jit
def load_exact(row, offsets, vocab, cap, CAP: tl.constexpr):
    """Logits in float64, -inf beyond the row."""
    found = tl.load(row + offsets, mask=offsets < vocab, other=0.0).to(tl.float64)
    if CAP:
        found = capped(found, cap)
    return tl.where(offsets < vocab, found, float("-inf"))


@triton.jit
def _log_mass(ties, rest):
    return tl.where(ties == 1.0, log1p(rest), tl.log(ties + rest))


@unspecialised
def careful(
    policy, reference, parts, inv_temperature, token_ids, values, states, cap: tl.float64,
    n: tl.int64, k: tl.int64, inner: tl.int64, first: tl.int64, vocab: tl.int64,
    segments: tl.int64, per_row: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64,
    FIELDS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrites state and values of the flagged rows among first .. ; grid (rows,)."""
    local = tl.program_id(0).to(tl.int64)
    row = first + local
    if tl.load(parts + segments * COLUMNS * n + row) == 0.0:
        return
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=(per_row & 2) != 0, other=1.0).to(tl.float64)
    x_row = row_pointer(policy, local, inner, x_outer, x_inner)
    y_row = row_pointer(reference, local, inner, y_outer, y_inner)
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float64)
    absent = float("-inf")

    largest_x = zero + absent
    largest_y = zero + absent
    nan_x = zero
    nan_y = zero
    for i in tl.range(0, vocab, BLOCK):
        x = load_exact(x_row, i + lane, vocab, cap, CAP)
        y = load_exact(y_row, i + lane, vocab, cap, CAP)
        largest_x = tl.maximum(largest_x, x)
        largest_y = tl.maximum(largest_y, y)
        nan_x += (x != x).to(tl.float64)
        nan_y += (y != y).to(tl.float64)
    top_x = tl.max(largest_x, 0)
    top_y = tl.max(largest_y, 0)
    bad_x = (tl.sum(nan_x, 0) > 0.0) | (top_x == float("inf"))
    bad_y = (tl.sum(nan_y, 0) > 0.0) | (top_y == float("inf"))
    if family_of(FIELDS) != "":  # its sweep takes the two rows together
        bad_x = bad_x | bad_y
        bad_y = bad_x
    none_x = top_x == absent
    none_y = top_y == absent
    top_x = tl.where(none_x, 0.0, top_x)
    top_y = tl.where(none_y, 0.0, top_y)

    ties_x = zero
    ties_y = zero
    rest_x = zero
    rest_y = zero
    gap_x = zero
    gap_y = zero
    only_x = zero
    only_y = zero
    for i in tl.range(0, vocab, BLOCK):
        x = load_exact(x_row, i + lane, vocab, cap, CAP)
        y = load_exact(y_row, i + lane, vocab, cap, CAP)
        down_x = tl.where(x == absent, 0.0, (top_x - x) * inv_t)
        down_y = tl.where(y == absent, 0.0, (top_y - y) * inv_t)
        weight_x = tl.where((x == absent) | (x == top_x), 0.0, tl.exp(-down_x))
        weight_y = tl.where((y == absent) | (y == top_y), 0.0, tl.exp(-down_y))
        ties_x += ((x == top_x) & (x != absent)).to(tl.float64)
        ties_y += ((y == top_y) & (y != absent)).to(tl.float64)
        rest_x += weight_x
        rest_y += weight_y
        gap_x += weight_x * down_x
        gap_y += weight_y * down_y
        only_x += ((x != absent) & (y == absent)).to(tl.float64)
        only_y += ((y != absent) & (x == absent)).to(tl.float64)
    mass_x = tl.sum(ties_x, 0) + tl.sum(rest_x, 0)
    mass_y = tl.sum(ties_y, 0) + tl.sum(rest_y, 0)
    p_sum = tl.where(none_x, absent, _log_mass(tl.sum(ties_x, 0), tl.sum(rest_x, 0)))
    q_sum = tl.where(none_y, absent, _log_mass(tl.sum(ties_y, 0), tl.sum(rest_y, 0)))
    centre = top_x - top_y
    residual = p_sum - q_sum

    forward = zero
    reverse = zero
    for i in tl.range(0, vocab, BLOCK):
        x = load_exact(x_row, i + lane, vocab, cap, CAP)
        y = load_exact(y_row, i + lane, vocab, cap, CAP)
        p = tl.where(x == absent, 0.0, tl.exp((x - top_x) * inv_t) / mass_x)
        q = tl.where(y == absent, 0.0, tl.exp((y - top_y) * inv_t) / mass_y)
        both = (x != absent) & (y != absent)
        ratio = tl.where(both, ((x - y) - centre) * inv_t - residual, 0.0)
        forward += tl.where(both, kl_terms(p, q, ratio), p)
        reverse += tl.where(both, kl_terms(q, p, -ratio), q)
    forward_kl = tl.where(tl.sum(only_y, 0) > 0.0, float("inf"), tl.sum(forward, 0))
    reverse_kl = tl.where(tl.sum(only_x, 0) > 0.0, float("inf"), tl.sum(reverse, 0))
    state = (
        top_x * inv_t,
        p_sum,
        top_y * inv_t,
        q_sum,
        centre,
        residual,
        forward_kl,
        reverse_kl,
        p_sum + tl.sum(gap_x, 0) / mass_x,
        q_sum + tl.sum(gap_y, 0) / mass_y,
    )
    state = with_nan(state, bad_x, bad_y)
    yes = vocab > 0
    # as the sweep found them
    logit_sum = tl.load(states + row * STATE_COLUMNS + 11)
    tokens = tl.load(states + row * STATE_COLUMNS + 12)
    store_row(
        state, row, yes, yes, values, states, x_row, y_row, token_ids, n, k, vocab, inv_t, cap, 1.0,
        logit_sum, tokens, FIELDS, True, CAP,
    )  # fmt: skip
