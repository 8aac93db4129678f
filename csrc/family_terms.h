// The terms of one token of the divergences of family_math.h, each written once for `Ops`: lanes of float, or one double.
// Included where the instruction set is chosen: a template belongs to the one that it was read in.
#pragma once
#include <type_traits>

#include "family_math.h"

namespace fusedkl {

constexpr double kFarthest = 1e4;  // e^-v is 0 from here on, v times it too

// v of a token that one side excludes, and the most that v is. A tilted term has e^(-tau v) with any tau > 0, and no v times it.
FUSEDKL_HD static inline double farthest(Family f) { return f == Family::tilted ? INFINITY : kFarthest; }

// 1 - e^-u and e^-u, each with its digits. In float, u below kLeast makes the first one -inf: so large a power may be of a `big` that
// has underflowed, and sums that are not finite are taken again in double.
template <class O>
struct Decay {
  typename O::V lost, left;
};
constexpr double kLeast = -60;

template <class O>
struct FamilyToken {
  using V = typename O::V;
  typename O::M policy_big;
  V l, v, d, rest, big;  // rest = 1 - d = e^-v, not by subtraction
  V exponent, weight;    // big = weight 2^exponent, also where that underflows

  FUSEDKL_MEMBER V p() const { return O::select(policy_big, big, big * rest); }
  FUSEDKL_MEMBER V q() const { return O::select(policy_big, big * rest, big); }
};

// Parameters of a kind, splatted.
template <class O>
struct FamilyConstants {
  using V = typename O::V;
  FamilyKind kind;
  bool two_sided;  // jsd; skew_kl is KL(q || m) alone
  V one, weight_q, weight_p, beta, rest_beta, half, near, minus_log2e;
  V series[13];  // tilted: N's term is q l^2 sum_j series[j] l^j for |l| <= near

  explicit FamilyConstants(const FamilyKind& k) : kind(k), two_sided(k.weight_p != 0) {
    one = O::set(1);
    half = O::set(0.5);
    weight_q = O::set(k.weight_q);
    weight_p = O::set(k.weight_p);
    beta = O::set(k.beta);
    rest_beta = O::set(1 - k.beta);
    near = O::set(series_reach(k));
    minus_log2e = O::set(-kLog2e);
    const double t = 1 - k.beta;
    double factorial = 2, power = t;  // of j + 2;  t^(j + 1)
    for (int j = 0; j < 13; j++, factorial *= j + 2, power *= t) series[j] = O::set(t * (1 - power) / factorial);
  }
};

// KL(big || m) and KL(small || m), m/big - 1 = -ws d: their terms, and log(m/big).
template <class O>
struct MixtureTerms {
  typename O::V big, small, log_m;
};

template <class O>
FUSEDKL_MEMBER typename O::V mixture_log(const FamilyConstants<O>& c, const FamilyToken<O>& t) {
  const auto z = O::set(0) - O::select(t.policy_big, c.beta, c.rest_beta) * t.d;
  return z - O::h(z);
}

template <class O>
FUSEDKL_MEMBER MixtureTerms<O> mixture_terms(const FamilyConstants<O>& c, const FamilyToken<O>& t) {
  const auto own = O::select(t.policy_big, c.rest_beta, c.beta), other = O::select(t.policy_big, c.beta, c.rest_beta);
  const auto z = O::set(0) - other * t.d, bent = O::h(z), log_m = z - bent;
  // m/small - 1 = own d / (1 - d) may be infinite: far from 1 its h is taken apart, where nothing cancels
  const auto far = own * t.d - t.rest * (log_m + t.v);
  const auto is_near = O::not_above(t.v, c.near);
  const auto near = t.rest * O::h(O::select(is_near, own * t.d / t.rest, O::set(0)));
  return {t.big * bent, t.big * O::select(is_near, near, far), log_m};
}

// The exponent of the smaller of p and q in q^a p^(1-a) = big e^(-tau v).
template <class O>
FUSEDKL_MEMBER typename O::V tilted_order(const FamilyConstants<O>& c, const FamilyToken<O>& t) {
  return O::select(t.policy_big, c.beta, c.rest_beta);
}

// log2 of q^a p^(1-a) / Z but for the token's weight
template <class O>
FUSEDKL_MEMBER typename O::V tilted_log2(const FamilyConstants<O>& c, const FamilyToken<O>& t, typename O::V log_z) {
  return O::fma(tilted_order(c, t) * t.v + log_z, c.minus_log2e, t.exponent);
}

// One token's terms of the sums.
template <class O>
struct FamilyTerms {
  typename O::V value, policy, reference;
};

template <Family F, class O>
FUSEDKL_MEMBER FamilyTerms<O> family_terms(const FamilyConstants<O>& c, const FamilyToken<O>& t) {
  const auto zero = O::set(0);
  if constexpr (F == Family::tvd) {
    return {c.half * t.big * t.d, O::select(t.policy_big, zero, t.p()), O::select(t.policy_big, t.q(), zero)};
  } else if constexpr (F == Family::mixture) {
    const auto k = mixture_terms(c, t);
    const auto of_q = O::select(t.policy_big, k.small, k.big), of_p = O::select(t.policy_big, k.big, k.small);
    const auto value = c.weight_q * of_q + c.weight_p * of_p;
    if (c.two_sided) return {value, c.weight_p * of_p, c.weight_q * of_q};
    // sum of p times its slope = alpha sum m (q/m - 1)^2
    const auto other = O::select(t.policy_big, c.beta, c.rest_beta), apart = c.rest_beta * t.d;  // |q - m| / big
    const auto slope = c.beta * t.big * apart * apart / (c.one - other * t.d);
    return {value, slope, value - slope};
  } else {
    const auto tau = tilted_order(c, t), u = tau * t.v;
    const auto decay = O::decay(u);
    auto sum = c.series[12];
    for (int j = 11; j >= 0; j--) sum = O::fma(sum, t.l, c.series[j]);
    const auto near = t.q() * t.l * t.l * sum, far = t.big * (decay.lost - tau * t.d);
    return {O::select(O::not_above(t.v, c.near), near, far), t.big * decay.left, zero};
  }
}

// Slopes less their means, times p and q: all of a gradient but its coefficients. `value`: gradient_value of the row.
template <class O>
struct FamilyGradient {
  typename O::V policy, reference;
};

template <Family F, class O>
FUSEDKL_MEMBER FamilyGradient<O> family_gradient_terms(const FamilyConstants<O>& c, const FamilyToken<O>& t,
                                                       typename O::V policy_mean, typename O::V reference_mean,
                                                       typename O::V value) {
  const auto zero = O::set(0), p = t.p(), q = t.q();
  if constexpr (F == Family::tvd) {
    // the masses of both sides of p = q; ties count with p < q, unless the rows are equal
    const auto p_above = reference_mean + value, q_below = policy_mean + value;
    return {p * O::select(t.policy_big, policy_mean, zero - p_above),
            q * O::select(t.policy_big, zero - q_below, reference_mean)};
  } else if constexpr (F == Family::mixture) {
    const auto log_m = mixture_log(c, t), to_big = zero - log_m, to_small = to_big - t.v;  // log(big/m), log(small/m)
    const auto q_over_m = O::select(t.policy_big, to_small, to_big), p_over_m = O::select(t.policy_big, to_big, to_small);
    if (c.two_sided) return {p * (c.weight_p * p_over_m - policy_mean), q * (c.weight_q * q_over_m - reference_mean)};
    const auto other = O::select(t.policy_big, c.beta, c.rest_beta), apart = c.rest_beta * t.d / (c.one - other * t.d);
    const auto rho = O::select(t.policy_big, zero - apart, apart);  // q/m - 1
    return {p * (zero - c.rest_beta * rho - policy_mean), q * (q_over_m - c.beta * rho - reference_mean)};
  } else {
    const auto log_z = value, w = t.weight * O::exp2_of(tilted_log2(c, t, log_z));
    const auto to_p = zero - c.beta * t.l - log_z, to_q = c.rest_beta * t.l - log_z;  // log(w/p), log(w/q)
    return {O::select(O::not_above(O::abs(to_p), c.near), p * O::one_minus_exp(zero - to_p), p - w),
            O::select(O::not_above(O::abs(to_q), c.near), zero - q * O::one_minus_exp(zero - to_q), w - q)};
  }
}

// One double.
struct ScalarOps {
  using V = double;
  using M = bool;
  FUSEDKL_MEMBER static V set(double v) { return v; }
  FUSEDKL_MEMBER static V select(M m, V yes, V no) { return m ? yes : no; }
  FUSEDKL_MEMBER static M not_above(V a, V b) { return a <= b; }
  FUSEDKL_MEMBER static V abs(V a) { return fabs(a); }
  FUSEDKL_MEMBER static V fma(V a, V b, V c) { return a * b + c; }
  FUSEDKL_MEMBER static V h(V z) { return h_of(z); }
  FUSEDKL_MEMBER static V one_minus_exp(V u) { return -expm1(-u); }
  FUSEDKL_MEMBER static Decay<ScalarOps> decay(V u) { return {-expm1(-u), exp(-u)}; }
  FUSEDKL_MEMBER static V exp2_of(V u) { return exp2(u); }
};

FUSEDKL_HD static inline FamilyToken<ScalarOps> family_token(Family family, const RowState& s, double x, double y, double inv_t) {
  const bool absent = x == -INFINITY && y == -INFINITY;
  const double l = absent ? 0 : ((x - y) - s.centre) * inv_t - s.residual, far = farthest(family);
  const double v = fabs(l) < far ? fabs(l) : far;
  const bool policy_big = l > 0;
  const double log_big =
      policy_big ? (x * inv_t - s.policy_max) - s.policy_log_sum : (y * inv_t - s.reference_max) - s.reference_log_sum;
  return {policy_big, policy_big ? v : -v, v, -expm1(-v), exp(-v), exp(log_big), log_big * kLog2e, 1};
}

// log2 of a token's q^a p^(1-a)
FUSEDKL_HD static inline double tilted_log2_at(const FamilyConstants<ScalarOps>& c, const RowState& s, double x, double y,
                                               double inv_t) {
  return tilted_log2(c, family_token(Family::tilted, s, x, y, inv_t), 0.0);
}

// run(a family as a constant); of the host or of the device as `run` is.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class R>
FUSEDKL_MEMBER auto family_switch(const FamilyKind& k, R run) {
  switch (k.family) {
    case Family::tvd: return run(std::integral_constant<Family, Family::tvd>());
    case Family::mixture: return run(std::integral_constant<Family, Family::mixture>());
    default: return run(std::integral_constant<Family, Family::tilted>());
  }
}

// One token's part of the sums.
FUSEDKL_HD static inline FamilySums family_sums_at(const FamilyConstants<ScalarOps>& c, const RowState& s, double x, double y,
                                                   double inv_t) {
  const FamilyToken<ScalarOps> t = family_token(c.kind.family, s, x, y, inv_t);
  auto terms = family_switch(c.kind, [&](auto f) { return family_terms<decltype(f)::value, ScalarOps>(c, t); });
  if (c.kind.family == Family::tilted && t.big == 0) {  // p and q underflow, which q^a p^(1-a) need not
    const double kept = exp2(tilted_log2(c, t, 0.0));
    terms = {-kept, kept, 0};
  }
  const double apart = t.big * t.d;
  return {terms.value, terms.policy, terms.reference, apart, t.policy_big ? apart : -apart};
}

// Gradients by one token's logits without their coefficients.
FUSEDKL_HD static inline FamilyGradient<ScalarOps> family_gradient_at(const FamilyConstants<ScalarOps>& c, const RowState& s,
                                                                      double x, double y, double inv_t) {
  if (x == -INFINITY && y == -INFINITY) return {0, 0};
  const FamilyToken<ScalarOps> t = family_token(c.kind.family, s, x, y, inv_t);
  return family_switch(c.kind, [&](auto f) {
    return family_gradient_terms<decltype(f)::value, ScalarOps>(c, t, s.policy_slope, s.reference_slope,
                                                                gradient_value(c.kind, s));
  });
}

}  // namespace fusedkl
