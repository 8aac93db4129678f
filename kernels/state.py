"""RowState of csrc/row_math.h as ten float64 tensors, in the order of the state's columns.

The eleventh column, `whole`, is 1 for a row and 0 for one merged from slices: no kernel reads it.
Those after it are of fields that these kernels do not make; they are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .family import SECOND_SWEEP

STATE_COLUMNS = tl.constexpr(16)


@triton.constexpr_function
def has(fields, name):
    """Whether a field is asked for, when a kernel is compiled."""
    return any(getattr(field, "value", field) == name for field in fields)


@triton.constexpr_function
def only(fields, name):
    """Whether it is the only one."""
    return len(fields) == 1 and getattr(fields[0], "value", fields[0]) == name


@triton.constexpr_function
def is_of_tokens(field):
    """Whether a field has a number for each token asked for."""
    return getattr(field, "value", field) in ("logprob", "ref_logprob", "log_ratio")


@triton.constexpr_function
def is_of_second_sweep(field):
    """Whether a field takes the second sweep (family.py)."""
    return getattr(field, "value", field) in SECOND_SWEEP


@triton.constexpr_function
def family_of(fields):
    """The field of a second sweep among them, or ""."""
    names = [getattr(field, "value", field) for field in fields]
    return next((name for name in names if is_of_second_sweep(name)), "")


@triton.jit
def load_state(states, row, live):
    """The states of rows of states [n, STATE_COLUMNS]."""
    at = states + row * STATE_COLUMNS
    return (
        tl.load(at, mask=live, other=0.0),
        tl.load(at + 1, mask=live, other=0.0),
        tl.load(at + 2, mask=live, other=0.0),
        tl.load(at + 3, mask=live, other=0.0),
        tl.load(at + 4, mask=live, other=0.0),
        tl.load(at + 5, mask=live, other=0.0),
        tl.load(at + 6, mask=live, other=0.0),
        tl.load(at + 7, mask=live, other=0.0),
        tl.load(at + 8, mask=live, other=0.0),
        tl.load(at + 9, mask=live, other=0.0),
    )


@triton.jit
def empty(like):
    """RowState of a segment without tokens."""
    zero = tl.where(like == like, 0.0, 0.0).to(tl.float64)
    none = zero - float("inf")
    return zero, none, zero, none, zero, zero, zero, zero, zero, zero


@triton.jit
def select(condition, a, b):
    """tl.where of two states."""
    return (
        tl.where(condition, a[0], b[0]),
        tl.where(condition, a[1], b[1]),
        tl.where(condition, a[2], b[2]),
        tl.where(condition, a[3], b[3]),
        tl.where(condition, a[4], b[4]),
        tl.where(condition, a[5], b[5]),
        tl.where(condition, a[6], b[6]),
        tl.where(condition, a[7], b[7]),
        tl.where(condition, a[8], b[8]),
        tl.where(condition, a[9], b[9]),
    )


@triton.jit
def with_nan(state, bad_x, bad_y):
    """NaN for all that is of a side that is bad, the other's own columns as they are."""
    x = tl.where(bad_x, float("nan"), 0.0).to(tl.float64)
    y = tl.where(bad_y, float("nan"), 0.0).to(tl.float64)
    p_max, p_sum, q_max, q_sum, centre, residual, forward, reverse, entropy, ref_entropy = state
    both = x + y
    return (
        p_max + x, p_sum + x, q_max + y, q_sum + y, centre + both, residual + both,
        forward + both, reverse + both, entropy + x, ref_entropy + y,
    )  # fmt: skip


@triton.jit
def without_mass(state, PAIR: tl.constexpr):
    """NaN for a side that is no distribution."""
    bare_x = state[1] == float("-inf")
    bare_y = (state[3] == float("-inf")) if PAIR else state[3] != state[3]
    return with_nan(state, bare_x, bare_y)
