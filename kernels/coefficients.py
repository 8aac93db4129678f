"""What a gradient sweep needs of a row, made once per row in float64 and read as fp32.

RowGradient of csrc/gradient_math.h, and the constants of its exponentials, as columns of a
[CONSTANTS, n] tensor. A column named hi is followed by what the rounding of it left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .family import row_factors, row_number
from .formulas import FAR, LN2, LOG2E, difference_too_coarse
from .layout import unspecialised
from .state import (
    STATE_COLUMNS,
    family_of,
    has,
    is_of_second_sweep,
    is_of_tokens,
    load_state,
    select,
)

NAMES = (
    *("ratio_hi", "ratio_lo"),  # T log-ratio of the normalisers: l = ((x - y) - ratio)/T
    *("mean_p_hi", "mean_p_lo", "mean_q_hi", "mean_q_lo"),  # l - R, l + F likewise
    *("shift_x", "weight_x", "top_x", "log_sum_x", "entropy_x"),
    *("shift_y", "weight_y", "top_y", "log_sum_y", "entropy_y"),
    *("moved", "reverse", "mass_x", "information_x"),
    *("ref_moved", "ref_forward", "mass_y", "information_y"),
    *("policy_slope", "reference_slope", "number"),  # of family.py, see family_slopes
    *("divergence", "ref_divergence", "uniform"),
    # 0: the gradient is 0, do not read the row;  1: compute;  2: NaN;  3: 1, far logits;
    # 4: 3 of the policy alone, and 0 for a reference that is no distribution;  5: and NaN for it;
    # 6, 7: the same with the sides exchanged
    "action",
)
CONSTANTS = tl.constexpr(len(NAMES))


@triton.jit
def store_two(out, n, live, value):
    high = value.to(tl.float32)
    tl.store(out, high, mask=live)
    low = tl.where(tl.abs(value) < FAR, (value - high).to(tl.float32), 0.0)
    tl.store(out + n, low, mask=live)


@triton.jit
def store_distribution(out, n, live, largest, log_sum, entropy, inv_t):
    """Five columns: 2^(v slope - shift) weight is a probability, (v - top)/T - log_sum its log."""
    slope = inv_t.to(tl.float32) * LOG2E
    shift = (largest / inv_t * slope).to(tl.float32)
    # what the rounding of the shift takes from the exponent
    weight = tl.exp((shift - largest / inv_t * slope) * LN2 - log_sum)
    top = (largest / inv_t).to(tl.float32)
    tl.store(out, shift, mask=live)
    tl.store(out + n, weight.to(tl.float32), mask=live)
    tl.store(out + 2 * n, top, mask=live)
    tl.store(out + 3 * n, (log_sum + (largest - top * inv_t)).to(tl.float32), mask=live)
    tl.store(out + 4 * n, entropy.to(tl.float32), mask=live)


@triton.jit
def is_none(log_sum):
    """Whether a row with this column of the state is no distribution."""
    return (log_sum == float("-inf")) | (log_sum != log_sum)


@triton.jit
def row_gradients(grad, row, n, k, live, FIELDS: tl.constexpr):
    """Gradients of a row's values by kind, the tokens' summed, and which are not all 0.

    Those of forward_kl, reverse_kl, entropy; of a mass and of the mean of log p; the same of the
    reference but for the mean; of a divergence of the second sweep. Whether any is not 0 of a value
    of both rows, of the policy's own, of the reference's own.
    """
    zero = tl.where(row == row, 0.0, 0.0).to(tl.float64)
    forward = zero
    reverse = zero
    entropy = zero
    mass = zero
    ref_entropy = zero
    ref_mass = zero
    mean = zero
    divergence = zero
    of_both = row != row
    of_x = of_both
    of_y = of_both
    at = grad + row
    for i in tl.static_range(len(FIELDS)):
        if is_of_tokens(FIELDS[i]):
            for _ in range(k):
                g = tl.load(at, mask=live, other=0.0).to(tl.float64)
                if FIELDS[i] == "logprob":
                    mass -= g
                    of_x = of_x | (g != 0.0)
                elif FIELDS[i] == "ref_logprob":
                    ref_mass -= g
                    of_y = of_y | (g != 0.0)
                else:
                    mass -= g
                    ref_mass += g
                    of_both = of_both | (g != 0.0)
                at += n
        else:
            g = tl.load(at, mask=live, other=0.0).to(tl.float64)
            given = g != 0.0
            if FIELDS[i] == "forward_kl":
                forward = g
                of_both = of_both | given
            elif FIELDS[i] == "reverse_kl":
                reverse = g
                of_both = of_both | given
            elif FIELDS[i] == "entropy":
                entropy = g
                of_x = of_x | given
            elif FIELDS[i] == "ref_entropy":
                ref_entropy = g
                of_y = of_y | given
            elif FIELDS[i] == "logsumexp":
                mass += g
                of_x = of_x | given
            elif FIELDS[i] == "mean_logprob":
                mass -= g
                mean = g
                of_x = of_x | given
            elif is_of_second_sweep(FIELDS[i]):
                divergence = g
                of_both = of_both | given
            else:
                tl.static_assert(FIELDS[i] == "ref_logsumexp", "unknown field")
                ref_mass += g
                of_y = of_y | given
            at += n
    return (
        forward, reverse, entropy, mass, ref_entropy, ref_mass, mean, divergence,
        of_both, of_x, of_y,
    )  # fmt: skip


@triton.jit
def coefficients(gradients, state, inv_t):
    """moved, reverse, mass, information of the policy, ref_moved, .. of the reference.

    Where a KL is +inf its policy gradient is p - q and its reference gradient 0.
    """
    forward, reverse, entropy, mass, ref_entropy, ref_mass, _, _, _, _, _ = gradients
    f_infinite = state[6] == float("inf")
    r_infinite = state[7] == float("inf")
    kept = tl.where(r_infinite, 0.0, inv_t * reverse)
    return (
        inv_t * (forward + tl.where(r_infinite, reverse, 0.0)),
        kept,
        inv_t * mass,
        -inv_t * entropy,
        -kept,
        tl.where(f_infinite, 0.0, -inv_t * forward),
        inv_t * ref_mass,
        -inv_t * ref_entropy,
    )


@triton.jit
def family_coefficients(gradients, states, row, live, inv_t, kind, FIELD: tl.constexpr):
    """Both mean slopes and the number of `family_slopes`, the coefficients of its two results, and
    what `moved` gets where the value is infinite.
    """
    g = gradients[7] * inv_t
    at = states + row * STATE_COLUMNS
    value = tl.load(at + 13, mask=live, other=0.0)
    infinite = value == float("inf")
    policy_mean = tl.load(at + 14, mask=live, other=0.0)  # of a tilted one: what it keeps
    policy, reference = row_factors(value, policy_mean, kind[0], kind[1], FIELD)
    return (
        policy_mean,
        tl.load(at + 15, mask=live, other=0.0),
        row_number(value, policy_mean, kind[1], FIELD),
        tl.where(infinite, 0.0, g * policy),
        tl.where(infinite, 0.0, g * reference),
        tl.where(infinite, g, 0.0),
    )


@triton.jit
def uniform_coefficient(gradients, states, row, live, inv_t):
    """Of the mean of log p: what every logit gets."""
    tokens = tl.load(states + row * STATE_COLUMNS + 12, mask=live, other=1.0)
    return inv_t * gradients[6] / tokens


@unspecialised
def prepare(
    grad, states, inv_temperature, constants, kind, n: tl.int64, k: tl.int64, per_row: tl.int64,
    FIELDS: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """constants[CONSTANTS, n] from grad [R, n] and the states; LANES rows a program.

    HALF: of rows of which both have 16 bits.
    """
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = row < n
    at = tl.where((per_row & 4) != 0, row, 0)
    inv_t = tl.load(inv_temperature + at, mask=live & ((per_row & 2) != 0), other=1.0)
    inv_t = inv_t.to(tl.float64)
    state = load_state(states, row, live)
    gradients = row_gradients(grad, row, n, k, live, FIELDS)
    c = coefficients(gradients, state, inv_t)
    _, _, _, _, _, _, _, _, of_both, of_x, of_y = gradients
    bad_x = is_none(state[1])
    bad_y = is_none(state[3])
    alone_x = bad_y & (of_both == 0) & ((bad_x == 0) | (of_y == 0))
    alone_y = bad_x & (of_both == 0) & ((bad_y == 0) | (of_x == 0)) & (alone_x == 0)
    FAMILY: tl.constexpr = family_of(FIELDS)
    if FAMILY != "":
        alone_x = alone_x & (alone_x == 0)
        alone_y = alone_x
    # numbers in place of a side's that is not looked at
    z = inv_t * 0.0
    x_only = (state[0], state[1], z, z, z, z, z, z, state[8], z)
    y_only = (z, z, state[2], state[3], z, z, z, z, z, state[9])
    state = select(alone_x, x_only, select(alone_y, y_only, state))
    forward = tl.where(state[6] == float("inf"), 0.0, state[6])
    reverse = tl.where(state[7] == float("inf"), 0.0, state[7])
    out = constants + row
    store_two(out, n, live, state[4] + state[5] / inv_t)
    store_two(out + 2 * n, n, live, state[4] + (state[5] + reverse) / inv_t)
    store_two(out + 4 * n, n, live, state[4] + (state[5] - forward) / inv_t)
    store_distribution(out + 6 * n, n, live, state[0], state[1], state[8], inv_t)
    store_distribution(out + 11 * n, n, live, state[2], state[3], state[9], inv_t)
    for i in tl.static_range(8):
        tl.store(out + (16 + i) * n, c[i].to(tl.float32), mask=live)
    if FAMILY != "":
        more = family_coefficients(gradients, states, row, live, inv_t, kind, FAMILY)
        for i in tl.static_range(5):
            tl.store(out + (24 + i) * n, more[i].to(tl.float32), mask=live)
        tl.store(out + 16 * n, (c[0] + more[5]).to(tl.float32), mask=live)
    if has(FIELDS, "mean_logprob"):
        uniform = uniform_coefficient(gradients, states, row, live, inv_t)
        tl.store(out + 29 * n, uniform.to(tl.float32), mask=live)
    beyond = (tl.abs(state[0]) > FAR) | (tl.abs(state[2]) > FAR)
    beyond = beyond | (inv_t > 1e5) | (inv_t < 1e-5)
    if HALF:
        beyond = beyond | difference_too_coarse(state[4] * inv_t, tl.minimum(state[6], state[7]))
    action = tl.where(bad_x | bad_y, 2.0, tl.where(beyond, 3.0, 1.0))
    action = tl.where(alone_x, tl.where(of_y, 5.0, 4.0), action)
    action = tl.where(alone_y, tl.where(of_x, 7.0, 6.0), action)
    action = tl.where(of_both | of_x | of_y, action, 0.0)
    tl.store(out + (CONSTANTS - 1) * n, action.to(tl.float32), mask=live)
