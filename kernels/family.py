"""The divergences that need log(p/q) before their first term, in Triton (csrc/family_math.h).

    l = log(p/q),  m = beta q + rest p,  rest = 1 - beta,  t = q^beta p^rest

    jsd      sum beta q log(q/m) + rest p log(p/m)
    skew_kl  sum q log(q/m) + rest (p - q)              beta is its alpha
    tvd      sum |p - q| / 2
    renyi, hellinger   by N = sum q + rest (p - q) - t; beta is the order, 1/2 for hellinger

Up to |l| = CLOSE a term is q times its Taylor series in l, for its sum is a small rest of large
numbers there; beyond, it is the formula. The series come out of the same functions, called with
truncated series instead of tensors. Written for float32 and float64.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import triton
import triton.language as tl

from .formulas import FAR, LN2, LOG2E, NEAR, gap, gap_coefficients, gap_polynomial, log1p

SECOND_SWEEP = ("jsd", "skew_kl", "renyi", "tvd", "hellinger")
# Coefficients of a series: the nearest singularity is at pi, the relative error at CLOSE 1e-7 for
# jsd at 1/2 and 3e-6 for skew_kl at 0.7. There a term is large against what log2_of rounds.
TERMS = tl.constexpr(7)
CLOSE = tl.constexpr(0.625)
# A mixture's |l| goes up to here: e^-|l| is 0, and |l| times it too.
FARTHEST = 1e4
# Powers of e that may belong to a token whose p and q have underflowed in float32.
LARGE = tl.constexpr(60.0)


@triton.constexpr_function
def farthest(field):
    """|l| of a token that one side excludes, and the most that |l| is.

    A tilted term has e^(-tau |l|) with any tau > 0, and no |l| times it.
    """
    return math.inf if field in ("renyi", "hellinger") else FARTHEST


@triton.jit
def exp_of(u):
    return tl.exp(u) if u.dtype == tl.float64 else tl.exp2(u * LOG2E)


@triton.jit
def log2_of(z):
    """In fp32, to 2e-7 absolute; where the hardware has it, in one instruction."""
    if tl.target_info.is_cuda():
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(z)


@triton.jit
def expm1_near(u):
    """e^u - 1 for |u| <= NEAR."""
    if u.dtype == tl.float64:
        return gap(u) + u
    else:
        return tl.fma(u * u, gap_polynomial(u, gap_coefficients(1.0)), u)


@triton.jit
def series_at(coefficients, l):  # noqa: E741
    """sum_j coefficients[j] l^j, j < TERMS."""
    found = l * 0.0 + coefficients[TERMS - 1]
    for j in tl.static_range(TERMS - 1):
        found = found * l + coefficients[TERMS - 2 - j]
    return found


@triton.jit
def mixture_terms(p, q, to_p, to_q, rho, beta, rest, unit, FIELD: tl.constexpr):
    """A token's terms of the value and of the mean slope under p.

    unit to_p = log(p/m), unit to_q = log(q/m), rho = q/m - 1. The mean under q is what is left of
    the value: it is homogeneous of degree 1 in p and q.
    """
    if FIELD == "jsd":
        of_p = (unit * rest) * (p * to_p)
        return of_p + (unit * beta) * (q * to_q), of_p + (beta * rest) * (q - p)
    else:
        return unit * (q * to_q) + rest * (p - q), (beta * rest) * ((q - p) * rho)


@triton.jit
def mixture_slopes(to_p, to_q, rho, beta, rest, FIELD: tl.constexpr):
    """The derivatives of the value by p and by q, each up to a constant."""
    if FIELD == "jsd":
        return rest * to_p, beta * to_q
    else:
        return -(rest * rho), to_q - beta * rho


@triton.jit
def tilted_lost(p, q, t, rest):
    """A token's term of N."""
    return (q - t) + rest * (p - q)


@triton.jit
def _logs(l, beta, rest):  # noqa: E741
    """log(p/m) and log(q/m), from the larger of p and q."""
    own = tl.where(l > 0.0, rest, beta)
    mass = (1.0 - own) * exp_of(-tl.abs(l)) + own
    log_m = tl.log(mass) if l.dtype == tl.float64 else log2_of(mass) * LN2
    return tl.minimum(l, 0.0) - log_m, -tl.maximum(l, 0.0) - log_m


@triton.jit
def tilted_log(l, beta, rest):  # noqa: E741
    """log of q^beta p^rest over the larger of p and q."""
    return -tl.where(l > 0.0, beta, rest) * tl.abs(l)


@triton.jit
def family_terms(p, q, l, kind, FIELD: tl.constexpr):  # noqa: E741
    """What a token adds to the four sums of a row (`family_value` has what they are).

    l = log2(p/q). In float32 per unit of q: q = 1 and p = 2^l, which is finite.
    """
    beta, rest, near, value, slope, _ = kind
    close = tl.abs(l) <= near
    if FIELD == "tvd":
        moved = tl.where(close, (q * l) * series_at(value, l), p - q)
        above = l > 0.0
        return (
            tl.where(above, moved, 0.0),
            tl.where(above, 0.0, -moved),
            tl.where(above, 0.0, p),
            tl.where(above, q, 0.0),
        )
    elif FIELD == "jsd" or FIELD == "skew_kl":
        if l.dtype == tl.float64:
            to_p, to_q = _logs(l * LN2, beta, rest)
            unit: tl.constexpr = 1.0
        else:
            log_m = log2_of(tl.fma(p, rest, beta))
            to_p = l - log_m
            to_q = -log_m
            unit: tl.constexpr = LN2
        rho = to_q
        if FIELD == "skew_kl":
            rho = exp_of(to_q * unit) - 1.0
        far, far_slope = mixture_terms(p, q, to_p, to_q, rho, beta, rest, unit, FIELD)
        small = (q * l) * l
        found = tl.where(close, small * series_at(value, l), far)
        of_p = tl.where(close, small * series_at(slope, l), far_slope)
        return found, of_p, found * 0.0, found * 0.0
    else:
        u = tilted_log(l * LN2, beta, rest)
        t = tl.where(l > 0.0, p, q) * exp_of(u)
        if l.dtype == tl.float32:  # beyond: not finite, and in float64 then
            t = tl.where(u > LARGE, float("inf"), t)
        lost = tl.where(close, ((q * l) * l) * series_at(value, l), tilted_lost(p, q, t, rest))
        return lost, t, lost * 0.0, lost * 0.0


@triton.jit
def family_sums(a, b, c, d, FIELD: tl.constexpr):
    """[3] of operator row_sums, from a slice's four sums; sums of slices add up.

    mixture  value, mean slope under p, under q
    tvd      value, sum of p where p <= q, sum of q where p > q
    tilted   N, sum q^beta p^rest, 0
    """
    if FIELD == "tvd":
        return (a + b) * 0.5, c, d
    elif FIELD == "jsd" or FIELD == "skew_kl":
        return a, b, a - b
    else:
        return a, b, a * 0.0


@triton.jit
def family_value(a, b, c, d, log_b, rest, forward_kl, FIELD: tl.constexpr):
    """The divergence of a whole row; float64. log_b: log of the second sum of a tilted one."""
    if FIELD == "tvd":
        # two equal sums: the one over less mass knows the log-ratio of its tokens better
        return tl.where(c < d, b, a)
    elif FIELD == "jsd" or FIELD == "skew_kl":
        return tl.where(a < 0.0, 0.0, a)
    elif FIELD == "hellinger":
        return tl.where(a < 0.0, 0.0, tl.where(a > 1.0, 1.0, a))
    else:
        small = tl.abs(a) < 0.5
        log_z = tl.where(small, log1p(-tl.where(small, a, 0.0)), log_b)
        found = log_z / -rest
        found = tl.where(found < 0.0, 0.0, found)
        return tl.where((rest < 0.0) & (forward_kl == float("inf")), float("inf"), found)


@triton.jit
def row_number(divergence, kept, rest, FIELD: tl.constexpr):
    """What a token's gradient needs of the row besides the means: log Z of a tilted one.

    kept: the second of `family_sums`. Where log Z is infinite its factor is 0, which a finite
    number keeps 0.
    """
    if FIELD == "hellinger":
        # 1 - divergence is but rounding where the rows hardly overlap
        near = divergence < 0.5
        return tl.where(
            near, log1p(-tl.where(near, divergence, 0.0)), tl.log(tl.maximum(kept, 1e-35))
        )
    elif FIELD == "renyi":
        return tl.where(divergence == float("inf"), 0.0, -rest * divergence)
    else:
        return divergence


@triton.jit
def row_factors(divergence, kept, beta, rest, FIELD: tl.constexpr):
    """What the incoming gradient is multiplied by, for `family_slopes` of the policy, reference."""
    one = divergence * 0.0 + 1.0
    if FIELD == "hellinger":
        half = 0.5 * tl.where(divergence < 0.5, 1.0 - divergence, kept) * one
        return half, -half
    elif FIELD == "renyi":
        return one, -beta / rest * one
    else:
        return one, one


@triton.jit
def bounded_ratio(v, x, inv_t, FIELD: tl.constexpr):
    """l of v = T l, `farthest` where one side has no token; anything where neither has.

    v may be NaN where a logit is infinite.
    """
    far: tl.constexpr = farthest(FIELD)
    l = tl.maximum(tl.minimum(v * inv_t, far), -far)  # noqa: E741
    return tl.where(x == float("-inf"), -far, l)


@triton.jit
def family_slopes(
    p, q, log_p, log_q, weight_p, weight_q, l, policy_mean, reference_mean, number, kind,  # noqa: E741
    FIELD: tl.constexpr,
):  # fmt: skip
    """p and q times their slopes less the means: a token's gradients but for `row_factors`.

    p = weight_p 2^log_p and q likewise, also where they underflow.
    """
    beta, rest, _, _, _, mixture = kind
    if FIELD == "tvd":
        # the masses of both sides of p = q; ties count with p < q, unless the rows are equal
        above = l > 0.0
        return (
            p * tl.where(above, policy_mean, -(reference_mean + number)),
            q * tl.where(above, -(policy_mean + number), reference_mean),
        )
    elif FIELD == "jsd" or FIELD == "skew_kl":
        close = tl.abs(l) <= NEAR
        to_p, to_q = _logs(l, beta, rest)
        log_m = l * series_at(mixture, l)
        to_p = tl.where(close, l - log_m, to_p)
        to_q = tl.where(close, -log_m, to_q)
        rho = to_q
        if FIELD == "skew_kl":
            rho = tl.where(close, expm1_near(to_q), exp_of(to_q) - 1.0)
        by_p, by_q = mixture_slopes(to_p, to_q, rho, beta, rest, FIELD)
        return p * (by_p - policy_mean), q * (by_q - reference_mean)
    else:
        # log(w/p) and log(w/q) of w = q^beta p^rest / Z
        to_p = -beta * l - number
        to_q = rest * l - number
        above = l > 0.0
        largest = tl.where(above, log_p, log_q)
        w = tl.exp2((tilted_log(l, beta, rest) - number) * LOG2E + largest)
        # a token that neither row has is at -FAR or below, and its l is infinite
        w = tl.where(largest > -FAR, w * tl.where(above, weight_p, weight_q), 0.0)
        return (
            tl.where(tl.abs(to_p) <= NEAR, -p * expm1_near(to_p), p - w),
            tl.where(tl.abs(to_q) <= NEAR, q * expm1_near(to_q), w - q),
        )


# ---- on the host: the series


class _Series:
    """A power series in l about 0, truncated: what the formulas above take for a number."""

    LENGTH = TERMS.value + 2

    def __init__(self, coefficients: list[float]) -> None:
        self.c = (coefficients + [0.0] * self.LENGTH)[: self.LENGTH]

    def __add__(self, other: _Series) -> _Series:
        return _Series([a + b for a, b in zip(self.c, other.c, strict=True)])

    def __sub__(self, other: _Series) -> _Series:
        return self + -1.0 * other

    def __mul__(self, other: _Series) -> _Series:
        return _Series(
            [sum(self.c[i] * other.c[j - i] for i in range(j + 1)) for j in range(self.LENGTH)]
        )

    def __rmul__(self, factor: float) -> _Series:
        return _Series([factor * a for a in self.c])

    def integral(self) -> _Series:
        return _Series([0.0, *(a / (j + 1) for j, a in enumerate(self.c))])


def _exponential(rate: float) -> _Series:
    """e^(rate l)"""
    return _Series([rate**j / math.factorial(j) for j in range(_Series.LENGTH)])


def _share(beta: float) -> _Series:
    """s = rest p/m, the derivative of log(m/q): s' = s - s^2."""
    c = [1 - beta]
    for j in range(_Series.LENGTH - 1):
        c.append((c[j] - sum(c[i] * c[j - i] for i in range(j + 1))) / (j + 1))
    return _Series(c)


def _reciprocal(share: _Series) -> _Series:
    """r = q/m: r' = -s r."""
    c = [1.0]
    for j in range(_Series.LENGTH - 1):
        c.append(-sum(share.c[i] * c[j - i] for i in range(j + 1)) / (j + 1))
    return _Series(c)


Kind = tuple[float, float, float, tuple[float, ...], tuple[float, ...], tuple[float, ...]]
_NONE = (0.0,) * TERMS.value


@functools.cache
def kind_of(field: str | None, parameter: float | None) -> Kind:
    """A field's parameter as kernels take it; of other fields, as many numbers."""
    if field is None:
        return 0.0, 1.0, 0.0, _NONE, _NONE, _NONE
    beta = 0.5 if field == "hellinger" else parameter or 0.0
    rest = 1 - beta
    p, q = _exponential(1), _Series([1.0])

    def from_power(
        series: _Series, power: int, scale: float = LN2.value
    ) -> tuple[float, ...]:  # of log2(p/q), unless scale is 1
        return tuple(series.c[j] * scale**j for j in range(power, power + TERMS.value))

    near = CLOSE.value * LOG2E.value
    if field == "tvd":
        return beta, rest, near, from_power(p - q, 1), _NONE, _NONE
    if field in ("renyi", "hellinger"):
        lost: Any = tilted_lost.fn(p, q, _exponential(rest), rest)
        return beta, rest, near / max(1.0, abs(rest)), from_power(lost, 2), _NONE, _NONE
    share = _share(beta)
    log_m = share.integral()
    to_p, to_q = _Series([0.0, 1.0]) - log_m, -1.0 * log_m
    rho = _reciprocal(share) - q
    value, slope = mixture_terms.fn(p, q, to_p, to_q, rho, beta, rest, 1.0, field)
    return beta, rest, near, from_power(value, 2), from_power(slope, 2), from_power(log_m, 1, 1.0)
