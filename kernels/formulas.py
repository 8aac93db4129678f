"""The mathematics of a row in Triton, one of its three homes (csrc/row_math.h has the derivations).

    x, y   policy and reference logits, T temperature; p = softmax(x/T), q = softmax(y/T)
    c      a centre of x - y;  v = (x - y) - c, u = v/T;  w = exp(y/T) up to a common factor
    g(u) = e^u - 1 - u >= 0,   k(u) = 1 + (u - 1) e^u >= 0,   h(z) = z - log1p(z) >= 0

Tokens are taken in fp32 with fused multiply-adds, rows in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# g(u)/u^2 is a polynomial up to here (minimax, relative error 8e-7), e^u - 1 - u beyond.
NEAR = tl.constexpr(0.5)
# Stands for infinity in a product with a weight of 0.
FAR = tl.constexpr(1e30)


# Two multiply-adds in one instruction; $2 $3 times $4 $5 plus $6 $7.
_PAIR = tl.constexpr("""{
.reg .b64 a, b, c;
mov.b64 a, {$2, $3};
mov.b64 b, {$4, $5};
mov.b64 c, {$6, $7};
fma.rn.f32x2 a, a, b, c;
mov.b64 {$0, $1}, a;
}""")


@triton.jit
def multiply_add(a, b, c):
    """tl.fma of float32 for the arguments of exponentials, which Triton does not pack by itself."""
    if tl.target_info.cuda_capability_geq(10, 0):
        return tl.inline_asm_elementwise(
            _PAIR, "=f,=f,f,f,f,f,f,f", [a, b, c], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return tl.fma(a, b, c)


@triton.jit
def gap_coefficients(inv_t):
    """Of the polynomial in v = T u whose product with v^2 is g(u)."""
    i2 = inv_t * inv_t
    i3 = i2 * inv_t
    i4 = i2 * i2
    return (
        i2 * 0.4999999701976776,
        i3 * 0.16666279733181,
        i4 * 0.041667476296424866,
        i4 * inv_t * 0.00839541107416153,
        i4 * i2 * 0.001391465193592012,
    )


@triton.jit
def gap_polynomial(v, coefficients):
    """g(u)/v^2 for |u| <= NEAR."""
    c0, c1, c2, c3, c4 = coefficients
    p = tl.fma(v, c4, c3)
    p = tl.fma(v, p, c2)
    p = tl.fma(v, p, c1)
    return tl.fma(v, p, c0)


@triton.jit
def difference(x, y, high, low, EXACT: tl.constexpr):
    """v = (x - y) - c. EXACT recovers the rounding of x - y, which 16-bit logits do not have."""
    return centred(x - y, x, y, high, low, EXACT)


@triton.jit
def centred(s, x, y, high, low, EXACT: tl.constexpr):
    """The same, with s = x - y at hand."""
    if EXACT:
        back = s - x
        error = (x - (s - back)) - (y + back)
        return ((s - high) + error) - low
    else:
        return (s - high) - low


@triton.jit
def difference_too_coarse(centre, kl):
    """Whether the rounding of x - y that `centred` does not recover shows (row_math.h); centre/T"""
    coarse = centre * 0.33
    return coarse * coarse * 3.5527136788005009e-15 > 2e-12 * tl.minimum(kl, 1.0)


@triton.jit
def _decay(x, cap):
    """e^(-2 |x/cap|)"""
    z = tl.abs(x) * (1.0 / cap)
    return tl.exp(-2.0 * z) if x.dtype == tl.float64 else tl.exp2(z * (-2.0 * LOG2E))


@triton.jit
def capped(x, cap):
    """cap tanh(x/cap); an absent token stays absent."""
    e = _decay(x, cap)
    top = 1.0 - e
    bottom = 1.0 + e
    if x.dtype != tl.float64:  # 1 - e has no digits left under a large cap: a continued fraction
        z = tl.abs(x) * (1.0 / cap)
        near = z <= 0.5
        v = tl.where(near, z * z, 0.0)
        top = tl.where(near, z * tl.fma(v, 10.0, 105.0), top)
        bottom = tl.where(near, tl.fma(v, v + 45.0, 105.0), bottom)
    t = top / bottom * cap
    return tl.where(x == float("-inf"), x, tl.where(x < 0.0, -t, t))


@triton.jit
def cap_slope(x, cap):
    """Its derivative, 1 / cosh^2(x/cap)."""
    e = _decay(x, cap)
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def capped_difference(x, y, cap):
    """capped(x) - capped(y) in fp32, relative to itself: cap sinh((x - y)/cap) / (cosh cosh)."""
    z = (x - y) * (1.0 / cap)
    near = tl.abs(z) <= NEAR
    v = tl.where(near, z, 0.0)
    # (e^v - e^-v)/2 = v + (g(v) - g(-v))/2
    coefficients = gap_coefficients(1.0)
    odd = gap_polynomial(v, coefficients) - gap_polynomial(-v, coefficients)
    far = tl.exp2(z * LOG2E) - tl.exp2(z * -LOG2E)
    sinh = tl.where(near, tl.fma(v * v, 0.5 * odd, v), 0.5 * far)
    slopes = tl.sqrt(cap_slope(x, cap)) * tl.sqrt(cap_slope(y, cap))
    return tl.where(tl.abs(z) <= 40.0, cap * sinh * slopes, capped(x, cap) - capped(y, cap))


@triton.jit
def gap(u):
    """g(u) in float64, to full relative accuracy."""
    near = tl.abs(u) <= 0.3
    v = tl.where(near, u, 0.0)
    series = v * 0.0 + 1.0
    for j in tl.static_range(15):
        series = 1.0 + series * v * (1.0 / (17 - j))
    return tl.where(near, series * v * v * 0.5, tl.exp(u) - 1.0 - u)


@triton.jit
def log1p_gap(z):
    """h(z) in float64, z > -1."""
    near = tl.abs(z) <= 0.1
    v = tl.where(near, z, 0.0)
    series = v * 0.0
    for j in tl.static_range(19):
        series = (1.0 - 2.0 * (j % 2)) / (20 - j) + series * v
    return tl.where(near, series * v * v, z - tl.log(1.0 + z))


@triton.jit
def log1p(z):
    """In float64, to full relative accuracy."""
    return tl.where(tl.abs(z) <= 0.1, z - log1p_gap(z), tl.log(1.0 + z))


@triton.jit
def kl_terms(p, q, ratio):
    """Summand of KL(q || p), ratio = log(p/q): q g(ratio), without cancelling where p is large."""
    return tl.where(ratio > 1.0, (p - q) - q * ratio, q * gap(tl.minimum(ratio, 1.0)))


@triton.jit
def excess_mass(s, sx, a, b):
    """sum w (e^u - 1), from sum w, sum w e^u, sum w u and sum w g(u).

    Near the centre it is a + b to full accuracy; far from it they may be so large that their sum
    has no digits left.
    """
    return tl.where(tl.abs(a) + b < 0.5 * s, a + b, sx - s)


@triton.jit
def forward_from_sums(s, a, b, m):
    """KL(q || p) of the sums about a centre (CentredSums::forward_kl)."""
    z = m / s
    direct = log1p(z) - a / s
    kl = tl.where((tl.abs(z) > 0.5) | (direct > 0.5), direct, b / s - log1p_gap(z))
    return tl.maximum(kl, 0.0)


@triton.jit
def reverse_from_sums(s, c, m):
    """KL(p || q) of the sums about a centre (CentredSums::reverse_kl)."""
    policy = s + m
    z = m / s
    direct = (m + c) / policy - log1p(z)
    kl = tl.where((tl.abs(z) > 0.5) | (direct > 0.5), direct, c / policy - log1p_gap(-m / policy))
    return tl.maximum(kl, 0.0)


@triton.jit
def _log_shares(max_a, sum_a, max_b, sum_b):
    """Of two masses with logs max + sum: which is larger, log of the total in two parts, shares.

    Support is decided by sum = -inf, never by an exponential that may have underflowed.
    """
    difference = (max_b - max_a) + (sum_b - sum_a)
    second = (sum_b > float("-inf")) & ((sum_a == float("-inf")) | (difference > 0.0))
    only = (sum_a == float("-inf")) | (sum_b == float("-inf"))
    less = tl.where(only, 0.0, tl.exp(-tl.abs(tl.where(only, 0.0, difference))))
    top = tl.where(second, max_b, max_a)
    log_sum = tl.where(second, sum_b, sum_a) + log1p(less)
    share_a = tl.where(second, less, 1.0) / (1.0 + less)
    share_b = tl.where(second, 1.0, less) / (1.0 + less)
    share_a = tl.where(sum_a == float("-inf"), 0.0, share_a)
    share_b = tl.where(sum_b == float("-inf"), 0.0, share_b)
    return second, top, log_sum, share_a, share_b


@triton.jit
def _kl_of_shares(p, q, kl, p_sum, q_sum, ratio):
    """One segment's part of KL(q || p)."""
    has_q = q_sum > float("-inf")
    infinite = has_q & ((p_sum == float("-inf")) | (kl == float("inf")))
    inside = tl.where(has_q, q * kl + kl_terms(p, q, ratio), p)
    return tl.where(infinite, float("inf"), inside)


@triton.jit
def merge(a, b, inv_t):
    """RowState of two segments taken as one vocabulary: the chain rule (row_math.h: merge)."""
    ap, aps, aq, aqs, ac, ar, af, av, ah, ai = a
    bp, bps, bq, bqs, bc, br, bf, bv, bh, bi = b
    _, p_max, p_sum, pa, pb = _log_shares(ap, aps, bp, bps)
    second, q_max, q_sum, qa, qb = _log_shares(aq, aqs, bq, bqs)
    centre = tl.where(second, bc, ac)
    origin = tl.where(second, br, ar)
    # log-ratio of the lighter segment about that of the heavier one (in q)
    other = ((bc - ac) * inv_t + (br - ar)) * tl.where(second, -1.0, 1.0)
    lighter = tl.where(second, qa, qb)
    has_other = lighter > 0.0
    spread = tl.where(has_other, lighter * (gap(other) + other), 0.0)
    bare = (aqs == float("-inf")) & (aps > float("-inf"))
    bare = bare | ((bqs == float("-inf")) & (bps > float("-inf")))
    # a share too small for a double, of a segment that the policy has all the same
    bare = bare | ((lighter == 0.0) & (other > 600.0))
    direct = ((p_max - q_max) - centre * inv_t) + (p_sum - q_sum)
    held = (spread > -0.5) & (spread < 1e6) & (bare == 0)
    residual = tl.where(held, origin + log1p(tl.where(held, spread, 0.0)), direct)
    la = (ac - centre) * inv_t + (ar - residual)
    lb = (bc - centre) * inv_t + (br - residual)
    forward = _kl_of_shares(pa, qa, af, aps, aqs, la) + _kl_of_shares(pb, qb, bf, bps, bqs, lb)
    reverse = _kl_of_shares(qa, pa, av, aqs, aps, -la) + _kl_of_shares(qb, pb, bv, bqs, bps, -lb)
    entropy = _entropy_of_shares(pa, ap, aps, ah, p_max, p_sum)
    entropy += _entropy_of_shares(pb, bp, bps, bh, p_max, p_sum)
    reference_entropy = _entropy_of_shares(qa, aq, aqs, ai, q_max, q_sum)
    reference_entropy += _entropy_of_shares(qb, bq, bqs, bi, q_max, q_sum)
    bad_x = tl.where((aps != aps) | (bps != bps), float("nan"), 0.0)
    bad_y = tl.where((aqs != aqs) | (bqs != bqs), float("nan"), 0.0)
    bad = bad_x + bad_y
    return (
        p_max + bad_x,
        p_sum + bad_x,
        q_max + bad_y,
        q_sum + bad_y,
        centre + bad,
        residual + bad,
        forward + bad,
        reverse + bad,
        entropy + bad_x,
        reference_entropy + bad_y,
    )


@triton.jit
def _entropy_of_shares(share, own_max, own_sum, entropy, total_max, total_sum):
    log_share = (own_max - total_max) + (own_sum - total_sum)
    return tl.where(share > 0.0, share * (entropy - log_share), 0.0)
