"""Gradients of log-probabilities at the very tokens that were asked for."""

from __future__ import annotations

import triton
import triton.language as tl

from .coefficients import (
    CONSTANTS,
    coefficients,
    family_coefficients,
    is_none,
    row_gradients,
    uniform_coefficient,
)
from .family import family_slopes
from .formulas import LOG2E, cap_slope, capped, gap
from .layout import row_pointer, unspecialised
from .second_sweep import log_ratio
from .state import family_of, has, load_state


@triton.jit
def _direct(grad, token_ids, row, n, k, token, line):
    """Sum of the gradients of a field at `token`, however often it was asked for."""
    total = tl.zeros(token.shape, tl.float64)
    for j in range(k):
        same = tl.load(token_ids + row * k + j) == token
        g = tl.load(grad + (line + j) * n + row).to(tl.float64)
        total += tl.where(same, g, 0.0)
    return total


@unspecialised
def token_gradients(
    policy, reference, grad, states, token_ids, inv_temperature, found, kind,
    cap: tl.float64, n: tl.int64, k: tl.int64, inner: tl.int64, first: tl.int64,
    line: tl.int64, ratio_line: tl.int64, vocab: tl.int64, per_row: tl.int64,
    x_outer: tl.int64, x_inner: tl.int64, y_outer: tl.int64, y_inner: tl.int64,
    FIELDS: tl.constexpr, POLICY: tl.constexpr, PAIR: tl.constexpr, CAP: tl.constexpr,
    BLOCK: tl.constexpr,
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
    gradients = row_gradients(grad, row, n, k, row >= 0, FIELDS)
    c = coefficients(gradients, state, inv_t)
    x = 0.0
    y = 0.0
    log_p = 0.0
    log_q = 0.0
    slope = tl.where(token == token, 1.0, 1.0).to(tl.float64)
    if POLICY or PAIR:
        x_row = row_pointer(policy, local, inner, x_outer, x_inner)
        x = tl.load(x_row + token, mask=inside, other=0.0).to(tl.float64)
        if CAP:
            slope = cap_slope(x, cap) if POLICY else slope
            x = capped(x, cap)
        log_p = (x * inv_t - state[0]) - state[1]
    if PAIR or not POLICY:
        y_row = row_pointer(reference, local, inner, y_outer, y_inner)
        y = tl.load(y_row + token, mask=inside, other=0.0).to(tl.float64)
        if CAP:
            slope = slope if POLICY else cap_slope(y, cap)
            y = capped(y, cap)
        log_q = (y * inv_t - state[2]) - state[3]
    p = tl.exp(log_p)
    q = tl.exp(log_q)
    moved = p * 0.0
    ratio = p * 0.0
    if PAIR:
        ratio = ((x - y) - state[4]) * inv_t - state[5]
        near = tl.maximum(tl.minimum(ratio, 1.0), -800.0)  # -inf where only the policy lacks it
        moved = tl.where((q > 0.0) & (ratio < 1.0), q * (gap(near) + near), p - q)
    if POLICY:
        own = p * (c[2] + tl.where(c[3] != 0.0, c[3] * (log_p + state[8]), 0.0))
        own += tl.where(c[1] != 0.0, c[1] * p * (ratio - state[7]), 0.0)
        value = tl.where(p > 0.0, own, 0.0) + tl.where(c[0] != 0.0, c[0] * moved, 0.0)
    else:
        own = q * (c[6] + tl.where(c[7] != 0.0, c[7] * (log_q + state[9]), 0.0))
        own += tl.where(c[5] != 0.0, c[5] * q * (ratio + state[6]), 0.0)
        value = tl.where(q > 0.0, own, 0.0) + tl.where(c[4] != 0.0, c[4] * moved, 0.0)
    FAMILY: tl.constexpr = family_of(FIELDS)
    if FAMILY != "":
        more = family_coefficients(gradients, states, row, row >= 0, inv_t, kind, FAMILY)
        l = log_ratio(x, y, state, inv_t, FAMILY)  # noqa: E741
        slopes = family_slopes(
            p, q, log_p * LOG2E, log_q * LOG2E, 1.0, 1.0, l, more[0], more[1], more[2], kind, FAMILY
        )
        own = slopes[0] * more[3] if POLICY else slopes[1] * more[4]
        finite = more[3] != 0.0 if POLICY else more[4] != 0.0
        value += tl.where(finite, own, moved * more[5] if POLICY else 0.0)
    if POLICY and has(FIELDS, "mean_logprob"):
        uniform = uniform_coefficient(gradients, states, row, row >= 0, inv_t)
        value += tl.where(x == float("-inf"), 0.0, uniform)
    if has(FIELDS, "logprob" if POLICY else "ref_logprob"):
        value += _direct(grad, token_ids, row, n, k, token, line) * inv_t
    if has(FIELDS, "log_ratio"):
        direct = _direct(grad, token_ids, row, n, k, token, ratio_line) * inv_t
        value += direct if POLICY else -direct
    _, _, _, _, _, _, _, _, of_both, of_x, of_y = gradients
    bad = of_both & (is_none(state[1]) | is_none(state[3]))
    bad = bad | ((of_x & is_none(state[1])) if POLICY else (of_y & is_none(state[3])))
    nan = tl.where(bad, float("nan"), 0.0)
    value = tl.where(value == 0.0, 0.0, value * slope)  # the slope at a NaN is one
    tl.store(found + row * k + j, value + nan, mask=j < k)


@unspecialised
def store_tokens(
    gradient, found, token_ids, constants,
    n: tl.int64, k: tl.int64, inner: tl.int64, first: tl.int64, vocab: tl.int64,
    g_outer: tl.int64, g_inner: tl.int64,
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
    # by way of float32: not every backend of Triton goes from float64 to bfloat16 at once
    tl.store(out, value.to(tl.float32).to(gradient.dtype.element_ty), mask=inside)
