// The divergences that need both normalisers before their terms: a second sweep over the row, given its RowState.
//
//   l = log(p/q),  v = |l|,  d = 1 - e^-v;  of a token's p and q, `big` is the larger and small = big (1 - d) the other
//   m = beta q + (1 - beta) p,  h(z) = z - log1p(z) >= 0
//
//   jsd      beta KL(q || m) + (1 - beta) KL(p || m)
//   skew_kl  KL(q || m), beta = alpha
//   tvd      sum |p - q| / 2
//   renyi, hellinger   by N = 1 - sum q^a p^(1-a):  D_a = log1p(-N) / (a - 1);  hellinger is N at a = 1/2
//
// All terms are of one sign, and none is a difference of large numbers: KL(q || m) = sum q h(m/q - 1), because the sum of m - q is 0.
// The terms of a token: family_terms.h.
#pragma once
#include "gradient_math.h"

namespace fusedkl {

enum class Family : int { none, mixture, tvd, tilted };

// A divergence of this file, with its parameter put in.
struct FamilyKind {
  Family family = Family::none;
  double beta = 0;                    // mixture: weight of q in m;  tilted: the order a
  double weight_q = 0, weight_p = 0;  // mixture: of KL(q || m) and KL(p || m)
  bool hellinger = false;

  static FamilyKind jsd(double beta) { return {Family::mixture, beta, beta, 1 - beta, false}; }
  static FamilyKind skew_kl(double alpha) { return {Family::mixture, alpha, 1, 0, false}; }
  static FamilyKind tvd() { return {Family::tvd, 0, 0, 0, false}; }
  static FamilyKind renyi(double alpha) { return {Family::tilted, alpha, 0, 0, false}; }
  static FamilyKind squared_hellinger() { return {Family::tilted, 0.5, 0, 0, true}; }

  // Whether the parameter is so near an end of its range that a token's terms cancel to less than float holds, or so large an
  // order that its series leaves the range of float.
  FUSEDKL_MEMBER bool is_delicate() const {
    if (family == Family::tilted) return fabs(beta - 1) < 0.01 || beta > 1000;
    return family == Family::mixture && (weight_p != 0 ? beta < 0.01 || beta > 0.99 : beta < 0.02 || beta > 0.95);
  }
};

// Sums over a slice of the vocabulary. The slopes of a divergence are its derivatives by p and by q; their means are what a
// gradient subtracts.
//   mixture  value, mean of the slope under p, under q
//   tvd      value, sum of p where p <= q, sum of q where p > q: a difference from +-1/2 would lose a peaked row's digits
//   tilted   N, sum q^a p^(1-a), 0
struct FamilySums {
  double value = 0, policy_slope = 0, reference_slope = 0;
  double apart = 0, excess = 0;  // sum |p - q|, sum (p - q): 0 but for what the row's log-ratio lacks

  FUSEDKL_MEMBER void add(const FamilySums& o) {
    value += o.value;
    policy_slope += o.policy_slope;
    reference_slope += o.reference_slope;
    apart += o.apart;
    excess += o.excess;
  }
};

// Whether a sum of q^a p^(1-a) has left the range of a double: its logarithm then takes a sweep of its own, in double.
FUSEDKL_HD static inline bool wants_log_sum(const FamilyKind& k, const FamilySums& sums) {
  return k.family == Family::tilted && !k.hellinger && !(sums.policy_slope > 1e-290 && sums.policy_slope < INFINITY);
}

// log of a sum of powers of 2 given by their exponents: no power need have a double.
struct LogSum {
  double top = -INFINITY, sum = 0;  // sum 2^top

  FUSEDKL_MEMBER void add(double exponent, double times = 1) {
    if (!(exponent > -INFINITY)) return;
    if (exponent > top) {
      sum *= exp2(top - exponent);
      top = exponent;
    }
    sum += times * exp2(exponent - top);
  }
  FUSEDKL_MEMBER double log_of() const { return sum > 0 ? kLn2 * top + log(sum) : -INFINITY; }
};

// Of the whole row: what the state keeps as `divergence`, given the sums and the logarithm of sum q^a p^(1-a).
FUSEDKL_HD static inline double family_value(const FamilyKind& k, const RowState& s, const FamilySums& sums, double log_sum) {
  // of the two equal sums, that of p - q > 0 and that of q - p, the one over less mass: it knows the log-ratio of its tokens better
  if (k.family == Family::tvd)
    return (sums.policy_slope < sums.reference_slope ? sums.apart - sums.excess : sums.apart + sums.excess) / 2;
  if (k.family != Family::tilted) return sums.value < 0 ? 0 : sums.value;
  if (k.hellinger) return sums.value < 0 ? 0 : sums.value > 1 ? 1 : sums.value;
  if (k.beta > 1 && s.forward_kl == INFINITY) return INFINITY;
  const double v = (fabs(sums.value) < 0.5 ? log1p(-sums.value) : log_sum) / (k.beta - 1);
  return v < 0 ? 0 : v;
}

// Most of the mass on one token, as far as the state knows: its maxima are of sampled tokens.
FUSEDKL_HD static inline bool is_peaked(const RowState& s) { return s.policy_log_sum < 0.7 || s.reference_log_sum < 0.7; }

// Whether a row's sums are to tell how good its log-ratio is. Rows whose peak the state does not know are far apart.
FUSEDKL_HD static inline bool may_want_mending(const RowState& s) { return is_peaked(s) || !(s.forward_kl < 4); }

// Whether the sums were taken with a log-ratio good enough; else it is mended, and they are to be taken again. In a peaked row
// the log-ratio of the top token is a tiny rest of larger numbers.
FUSEDKL_HD static inline bool mend_log_ratio(RowState& s, const FamilySums& sums) {
  if (!(fabs(sums.excess) > 1e-6 * sums.apart) || !(fabs(sums.excess) < 0.1)) return false;
  s.residual += log1p(sums.excess);
  return true;
}

// Renyi's divergence is the logarithm of how far the rows overlap. Where they hardly do, no sum about a centre in float knows their
// log-ratio: state and sums are to be made in double. Told from the sums of sweeps that mend.
FUSEDKL_HD static inline bool hardly_overlap(const FamilyKind& k, const FamilySums& sums) {
  return k.family == Family::tilted && !k.hellinger && sums.apart > 1.99;
}

FUSEDKL_HD static inline void set_family(RowState& s, const FamilyKind& k, const FamilySums& sums, double log_sum) {
  s.divergence = family_value(k, s, sums, log_sum);
  s.policy_slope = sums.policy_slope;
  s.reference_slope = sums.reference_slope;
}

// log of sum q^a p^(1-a), from what the state keeps. 1 - hellinger is but rounding where the rows hardly overlap.
FUSEDKL_HD static inline double tilted_log_z(const FamilyKind& k, const RowState& s) {
  if (!k.hellinger) return (k.beta - 1) * s.divergence;
  return s.divergence < 0.5 ? log1p(-s.divergence) : log(s.policy_slope);
}

// Whether a gradient takes double: float knows a token's w = q^a p^(1-a) / Z no better than the logarithm of Z.
FUSEDKL_HD static inline bool has_double_gradient(const FamilyKind& k, const RowState& s) {
  return k.is_delicate() || (k.family == Family::tilted && fabs(tilted_log_z(k, s)) > 32);
}

// Whether both sides of a mixture weigh enough that, beyond that reach, its terms are large against what a logarithm of m rounds
FUSEDKL_HD static inline bool is_balanced(const FamilyKind& k) {
  return k.family == Family::mixture && 1 - k.beta >= (k.weight_p != 0 ? 0.099 : 0.5) && k.beta >= 0.099;
}

// |l| up to which series in l serve
FUSEDKL_HD static inline double series_reach(const FamilyKind& k) {
  return k.family == Family::tilted && k.beta > 2 ? 1 / (k.beta - 1) : 1;
}

// What a token's gradient needs of the row besides the means
FUSEDKL_HD static inline double gradient_value(const FamilyKind& k, const RowState& s) {
  return k.family == Family::tilted ? tilted_log_z(k, s) : s.divergence;
}

// The incoming gradient of the divergence times this is the coefficient of
//   p (slope - mean slope) and q (slope - mean slope), or for tilted, with w = q^a p^(1-a) / Z, of p - w and of w - q.
FUSEDKL_HD static inline double policy_factor(const FamilyKind& k, const RowState& s) {
  return k.hellinger ? 0.5 * exp(tilted_log_z(k, s)) : 1;
}
FUSEDKL_HD static inline double reference_factor(const FamilyKind& k, const RowState& s) {
  if (k.family != Family::tilted) return 1;
  return k.hellinger ? -policy_factor(k, s) : k.beta / (k.beta - 1);
}

// The gradient of such a divergence, put to the row's other coefficients. An infinite one pulls the policy as an infinite KL does.
FUSEDKL_HD static inline void add_family_gradient(RowGradient& r, const FamilyKind& k, const RowState& s, double inv_t,
                                                  double g) {
  if (g == 0) return;
  if (s.divergence == INFINITY) {
    r.forward += inv_t * g;
    return;
  }
  r.divergence = inv_t * g * policy_factor(k, s);
  r.ref_divergence = inv_t * g * reference_factor(k, s);
  if (s.divergence != s.divergence) r.divergence = r.ref_divergence = NAN;
}

}  // namespace fusedkl
