// The mathematics of a row of two distributions over a vocabulary: its numbers, and how those of segments merge. With
// gradient_math.h and family_math.h the one C++ home of every formula.
//
//   x, y   policy and reference logits, T temperature;  p = softmax(x/T), q = softmax(y/T)
//   c      a centre: any number near the reference-weighted mean of x - y
//   u      ((x - y) - c) / T,   w = exp(y/T) up to a common factor
//   S = sum w,  A = sum w u,  B = sum w g(u),  C = sum w k(u)
//   g(u) = e^u - 1 - u >= 0,   k(u) = 1 + (u - 1) e^u >= 0,   h(z) = z - log1p(z) >= 0
//
// Then, with z = (A + B) / S, the policy's mass is S + A + B, log-ratio D = lse(x/T) - lse(y/T) = c/T + log1p(z), and
//   forward_kl = KL(q || p) = B/S - h(z),            reverse_kl = KL(p || q) = C/Sx - h(-(A+B)/Sx),  Sx = S + A + B.
// The error is of second order in the centre, nothing large is ever subtracted, and no second exponential is needed.
#pragma once
#include <math.h>
#include <stdint.h>

// Member functions are forced inline: this header is compiled for several instruction sets, and an out-of-line copy made for
// one of them could be picked by the linker for all.
#if defined(__CUDACC__)
#define FUSEDKL_HD __host__ __device__
#define FUSEDKL_MEMBER __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define FUSEDKL_HD
#define FUSEDKL_MEMBER __forceinline
#else
#define FUSEDKL_HD
#define FUSEDKL_MEMBER __attribute__((always_inline)) inline
#endif

namespace fusedkl {

#if defined(__CUDACC__)
// Called, not inlined: a kernel's cold code has dozens of these, each of a hundred instructions.
#define FUSEDKL_CALLED(name) \
  __host__ __device__ __noinline__ inline double name(double v) { return ::name(v); }
FUSEDKL_CALLED(exp)
FUSEDKL_CALLED(exp2)
FUSEDKL_CALLED(expm1)
FUSEDKL_CALLED(log)
FUSEDKL_CALLED(log2)
FUSEDKL_CALLED(log1p)
FUSEDKL_CALLED(tanh)
FUSEDKL_CALLED(cosh)
#undef FUSEDKL_CALLED
#endif

// Row numbers that outlive the forward sweep; one row of the `state` tensor. A segment of a row has the same numbers,
// taken as if the segment were the whole vocabulary; merge() makes a row of its segments.
// logsumexp is kept as (max, log_sum): |lse| = 1e4 would cost 5e-4 of p in one float, and log p of a peaked row in one double.
struct RowState {
  double policy_max, policy_log_sum;        // logsumexp(x/T) = max + log_sum, max = (largest sampled x)/T
  double reference_max, reference_log_sum;  // logsumexp(y/T)
  double centre, residual;                  // D = lse(x/T) - lse(y/T) = centre/T + residual: l = ((x - y) - centre)/T - residual
  double forward_kl, reverse_kl;  // forward_kl stands for a reverse_kl that was not asked for, where no token is far off
  double entropy, reference_entropy;
  double whole;              // 1: of the whole row that a backward gets to read; 0: merged from slices, of which it gets one
  double logit_sum, tokens;  // sum of x/T, over how many logits; mean log p = logit_sum / tokens - lse(x/T)
  // of a divergence that takes a second sweep: its value and the means of its slopes (family_math.h); of the whole row only
  double divergence, policy_slope, reference_slope;
};
constexpr int kStateColumns = 16;
static_assert(sizeof(RowState) == kStateColumns * sizeof(double));

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// Minimax coefficients of g(u)/u^2. Largest relative error in brackets.
constexpr float kPoly4[] = {0.49999997f, 0.1666628f, 0.041667476f, 0.008395411f, 0.0013914652f};  // |u| <= 0.5  [8e-7]
constexpr float kPoly6[] = {0.5f,          0.16666695f,   0.041666515f,
                            0.00833093f,   0.0013891335f, 0.00020325484f,  // |u| <= 1  [1.1e-7]
                            2.4960811e-05f};
constexpr float kPoly8[] = {0.49999997f,    0.16666646f,    0.041666847f,   0.008334049f,  0.0013886975f,  // |u| <= 2  [1.2e-7]
                            0.00019774109f, 2.4847946e-05f, 2.9843188e-06f, 2.8162347e-07f};
constexpr float kPolySplit[] = {0.5f, 0.16666573f, 0.04166686f, 0.008363733f, 0.0013901531f};  // |u| <= ln2/2  [1.4e-7]
// 2^r on [0, 1), relative error 1.2e-7, exactly 1 at 0: the largest weight of a row is 1 and no log-probability exceeds 0
constexpr float kExp2[] = {1.f, 0.693151057f, 0.240165934f, 0.0557979867f, 0.00901629869f, 0.00186858221f};

FUSEDKL_HD static inline bool is_finite(double v) { return v - v == 0; }

// g(u) = e^u - 1 - u, to full relative accuracy
FUSEDKL_HD static inline double g_of(double u) {
  if (fabs(u) > 0.3) return expm1(u) - u;
  double sum = 1;
  for (int j = 17; j > 2; j--) sum = 1 + sum * u * (1.0 / j);
  return u * u / 2 * sum;
}

// k(u) = 1 + (u - 1) e^u
FUSEDKL_HD static inline double k_of(double u) {
  if (fabs(u) > 0.3) return 1 + (u - 1) * exp(u);
  double sum = 16;
  for (int j = 17; j > 2; j--) sum = (j - 2) + sum * u * (1.0 / j);
  return u * u / 2 * sum;
}

// g(u) and g(-u) of |u| <= 0.3, from one series for each of cosh u - 1 and sinh u - u.
struct BothGaps {
  double of_u, of_minus_u;
};
FUSEDKL_HD static inline BothGaps gaps_near_zero(double u) {
  const double s = u * u;
  double even = 1, odd = 1;
  for (int j = 12; j > 2; j -= 2) {
    even = 1 + even * s * (1.0 / (j * (j - 1)));
    odd = 1 + odd * s * (1.0 / (j * (j + 1)));
  }
  even *= s * 0.5;
  odd *= s * u * (1.0 / 6);
  return {even + odd, even - odd};
}

// h(z) = z - log1p(z)
FUSEDKL_HD static inline double h_of(double z) {
  if (fabs(z) > 0.1) return z - log1p(z);
  double sum = 0;
  for (int j = 20; j > 1; j--) sum = ((j & 1) ? -1.0 : 1.0) / j + sum * z;
  return sum * z * z;
}

// The sums about one centre. All members carry the same unknown common factor.
struct CentredSums {
  double S = 0, A = 0, B = 0, C = 0;
  double M = 0;  // sum w expm1(u) = A + B, apart because A and B may be so large that their sum has no digits left

  FUSEDKL_MEMBER void scale(double factor) {
    S *= factor;
    A *= factor;
    B *= factor;
    C *= factor;
    M *= factor;
  }

  FUSEDKL_MEMBER double policy_mass() const { return S + M; }

  // u -> u - t. For |t| > 1/2 the policy's mass is rebuilt from its own sum: B + expm1(-t) B would lose e^-t of its digits.
  FUSEDKL_MEMBER void recentre(double t) {
    const double e = exp(-t), em = expm1(-t), policy = policy_mass(), kept = M + C;
    if (fabs(t) > 0.5) {
      C = S + e * (kept - (1 + t) * policy);
      B = e * policy - (S + (A - t * S));
    } else {
      C += em * kept + e * g_of(t) * policy;
      B += em * M + g_of(-t) * S;
    }
    M += em * policy;
    A -= t * S;
  }

  // The same for |t| <= 0.3, without an exponential.
  FUSEDKL_MEMBER void recentre_near(double t) {
    const BothGaps g = gaps_near_zero(t);
    const double em = g.of_minus_u - t, policy = policy_mass();
    C += em * (M + C) + (1 + em) * g.of_u * policy;
    B += em * M + g.of_minus_u * S;
    M += em * policy;
    A -= t * S;
  }

  // The centre is too far from the mean: about it, rounding would be amplified in B, and A would know the log-ratio of the bulk
  // of the row no better than the spread of a few outliers.
  FUSEDKL_MEMBER bool off_centre() const { return B > 0.1 * S ? fabs(A) > 0.3 * S : A * A > 0.04 * B * S; }

  // Whether a centre `away` from this one (a difference of logits, not scaled) would not be off_centre().
  FUSEDKL_MEMBER bool near_mean(double away, double inv_t) const {
    const double off = A / S - away * inv_t, spread = B / S - 0.5 * (A / S) * (A / S);
    return spread < 0.1 && off * off < 0.03 * spread;
  }

  FUSEDKL_MEMBER double log_ratio_about_centre() const { return log1p(M / S); }

  FUSEDKL_MEMBER double forward_kl() const {
    const double z = M / S, direct = log1p(z) - A / S;
    const double kl = fabs(z) > 0.5 || direct > 0.5 ? direct : B / S - h_of(z);
    return kl < 0 ? 0 : kl;
  }

  FUSEDKL_MEMBER double reverse_kl() const {
    const double policy = policy_mass(), z = M / S, direct = (M + C) / policy - log1p(z);
    const double kl = fabs(z) > 0.5 || direct > 0.5 ? direct : C / policy - h_of(-M / policy);
    return kl < 0 ? 0 : kl;
  }
};

// The sums of the exact path, in double and from both rows' own weights: any support, any size.
struct ExactSums {
  CentredSums sums;
  bool policy_lacks = false, reference_lacks = false;  // a token of the one that the other excludes

  // q and e: the token's weights q and q e^u, both known on their own scale
  FUSEDKL_MEMBER void add(double x, double y, double q, double e, double centre, double inv_t) {
    if (x == -INFINITY && y == -INFINITY) return;
    sums.S += q;
    if (x == -INFINITY || y == -INFINITY) {
      (x == -INFINITY ? policy_lacks : reference_lacks) = true;
      sums.B += e - q;
      sums.M += e - q;
      sums.C += q;
      return;
    }
    const double u = ((x - y) - centre) * inv_t;
    const bool near = fabs(u) < 30;
    sums.A += q * u;
    sums.B += near ? q * g_of(u) : e - q - q * u;
    sums.C += near ? q * k_of(u) : q + e * (u - 1);
    sums.M += near ? q * expm1(u) : e - q;
  }
};

// Entropy of a distribution given about its largest logit m: ties = number of entries equal to m, rest = sum of e^(v-m) over
// the others, gap = sum of e^(v-m) (m-v). Both terms are >= 0, so a peaked row keeps its digits.
FUSEDKL_HD static inline double log_mass(double ties, double rest) { return ties == 1 ? log1p(rest) : log(ties + rest); }
FUSEDKL_HD static inline double entropy_of(double ties, double rest, double gap) {
  return log_mass(ties, rest) + gap / (ties + rest);
}

struct EntropySums {
  double ties = 0, rest = 0, gap = 0;

  // a logit `down` (>= 0, in units of T) below the largest
  FUSEDKL_MEMBER void add(double down) {
    if (down == 0) {
      ties += 1;
    } else if (down < INFINITY) {
      const double w = exp(-down);
      rest += w;
      gap += w * down;
    }
  }

  // The largest logit is `step` (> 0, in units of T) above the one that the sums are about.
  FUSEDKL_MEMBER void raise(double step) {
    const double factor = exp(-step), mass = ties + rest;
    gap = factor * (gap + mass * step);
    rest = factor * mass;
    ties = 0;
  }
};

// The rounding of x - y in a float (half an ulp of the centre, in units of T; a third of it on average) is not negligible against
// sqrt(2 KL): a sweep over 16-bit logits that does not recover it will not do.
FUSEDKL_HD static inline bool difference_too_coarse(double centre, double kl) {
  const double typical = 0.33 * centre;
  return typical * typical * 0x1p-48 > 2e-12 * (kl < 1 ? kl : 1);
}
// Of the two KLs the smaller one counts: a few tokens that the policy hardly has make forward_kl as large as they like, or infinite,
// and say nothing of how much the others differ.
FUSEDKL_HD static inline bool difference_too_coarse(const RowState& s, double inv_t) {
  return difference_too_coarse(s.centre * inv_t, s.reverse_kl < s.forward_kl ? s.reverse_kl : s.forward_kl);
}

// A side that is no distribution (NaN, +inf, or no mass at all) takes with it what stands on it, and leaves the other side alone.
FUSEDKL_HD static inline void lose_pair(RowState& s) {
  s.centre = s.residual = s.forward_kl = s.reverse_kl = s.divergence = s.policy_slope = s.reference_slope = NAN;
}
FUSEDKL_HD static inline void lose_policy(RowState& s) {
  s.policy_max = s.policy_log_sum = s.entropy = s.logit_sum = NAN;
  lose_pair(s);
}
FUSEDKL_HD static inline void lose_reference(RowState& s) {
  s.reference_max = s.reference_log_sum = s.reference_entropy = NAN;
  lose_pair(s);
}
FUSEDKL_HD static inline RowState nan_state() {
  RowState s{};
  lose_policy(s);
  lose_reference(s);
  return s;
}

// A side without any mass is kept as such in the state, which a slice of a row may have; as a row it is no distribution.
FUSEDKL_HD static inline RowState settled(RowState s) {
  if (s.policy_log_sum == -INFINITY) lose_policy(s);
  if (s.reference_log_sum == -INFINITY) lose_reference(s);
  return s;
}

// A logit under a softcap (0: none) and its slope. A token that does not exist stays absent.
FUSEDKL_HD static inline double softcapped(double x, double cap) { return cap == 0 || x == -INFINITY ? x : cap * tanh(x / cap); }
FUSEDKL_HD static inline double softcap_slope(double x, double cap) {
  if (cap == 0) return 1;
  const double c = cosh(x / cap);
  return 1 / (c * c);
}

FUSEDKL_HD static inline double mean_logprob(const RowState& s) {
  return (s.logit_sum / s.tokens - s.policy_max) - s.policy_log_sum;
}

// A row of which the maxima and the sums about them are known, before its divergences: masses, and D where it cannot be better.
FUSEDKL_HD static inline RowState exact_masses(double max_x, const EntropySums& x, double max_y, const EntropySums& y,
                                               double inv_t) {
  RowState s{};
  const bool has_x = max_x > -INFINITY, has_y = max_y > -INFINITY;
  s.policy_max = has_x ? max_x * inv_t : 0;
  s.reference_max = has_y ? max_y * inv_t : 0;
  s.policy_log_sum = has_x ? log_mass(x.ties, x.rest) : -INFINITY;
  s.reference_log_sum = has_y ? log_mass(y.ties, y.rest) : -INFINITY;
  s.entropy = has_x ? entropy_of(x.ties, x.rest, x.gap) : 0;
  s.reference_entropy = has_y ? entropy_of(y.ties, y.rest, y.gap) : 0;
  if (!has_x || !has_y) s.residual = has_x ? INFINITY : has_y ? -INFINITY : 0;
  return s;
}

// log of the total of parts whose logs are max + log_sum, about the heaviest part; index of that part in `heaviest`
FUSEDKL_HD static inline double merged_log_sum(const RowState* parts, int count, bool policy, int* heaviest) {
  *heaviest = 0;
  auto lse = [&](int i) {
    return policy ? parts[i].policy_max + parts[i].policy_log_sum : parts[i].reference_max + parts[i].reference_log_sum;
  };
  for (int i = 1; i < count; i++)
    if (lse(i) > lse(*heaviest)) *heaviest = i;
  if (!(lse(*heaviest) > -INFINITY)) return 0;  // no mass in any part
  double others = 0;
  for (int i = 0; i < count; i++)
    if (i != *heaviest) others += exp(lse(i) - lse(*heaviest));
  return log1p(others);  // to be added to the heaviest part's own log_sum
}

// Chain rule over segments: KL = sum_i Q_i KL_i + KL over the masses (Q_i, P_i), entropy likewise. Segments count as tokens
// whose difference of logits is their D. A segment without mass on one side has log_sum = -inf there (support is decided by that, never
// by an exponential that may underflow).
FUSEDKL_HD static inline RowState merge(const RowState* parts, int count, double inv_t) {
  if (count == 1) return parts[0];
  bool bad_policy = false, bad_reference = false;
  for (int i = 0; i < count; i++) {
    bad_policy |= parts[i].policy_log_sum != parts[i].policy_log_sum;
    bad_reference |= parts[i].reference_log_sum != parts[i].reference_log_sum;
  }
  RowState row{};
  int top_p, top_q;
  const double more_p = merged_log_sum(parts, count, true, &top_p), more_q = merged_log_sum(parts, count, false, &top_q);
  row.policy_max = parts[top_p].policy_max;
  row.policy_log_sum = parts[top_p].policy_log_sum + more_p;
  row.reference_max = parts[top_q].reference_max;
  row.reference_log_sum = parts[top_q].reference_log_sum + more_q;
  auto log_p = [&](int i) {
    return ((parts[i].policy_max - parts[top_p].policy_max) + (parts[i].policy_log_sum - parts[top_p].policy_log_sum)) - more_p;
  };
  auto log_q = [&](int i) {
    return ((parts[i].reference_max - parts[top_q].reference_max) +
            (parts[i].reference_log_sum - parts[top_q].reference_log_sum)) -
           more_q;
  };
  // about the heaviest segment, D keeps the digits that a difference of two logsumexps of size 1e4 would lose
  const RowState& origin = parts[top_q];
  auto log_ratio_from = [&](int i, const RowState& from) {
    return (parts[i].centre - from.centre) * inv_t + (parts[i].residual - from.residual);
  };
  double spread = 0;
  bool one_sided = false;
  for (int i = 0; i < count; i++) {
    const bool has_p = parts[i].policy_log_sum > -INFINITY, has_q = parts[i].reference_log_sum > -INFINITY;
    one_sided |= has_p && !has_q;
    if (has_q) spread += exp(log_q(i)) * expm1(log_ratio_from(i, origin));
  }
  row.centre = origin.centre;
  row.residual = !one_sided && spread > -0.5 && spread < 1e6 ? origin.residual + log1p(spread)
                                                             : ((row.policy_max - row.reference_max) - origin.centre * inv_t) +
                                                                   (row.policy_log_sum - row.reference_log_sum);
  for (int i = 0; i < count; i++) {
    const bool has_p = parts[i].policy_log_sum > -INFINITY, has_q = parts[i].reference_log_sum > -INFINITY;
    const double p = has_p ? exp(log_p(i)) : 0, q = has_q ? exp(log_q(i)) : 0, l = log_ratio_from(i, row);
    if (has_q && (!has_p || parts[i].forward_kl == INFINITY)) row.forward_kl = INFINITY;
    else if (has_q) row.forward_kl += q * parts[i].forward_kl + (l > 1 ? (p - q) - q * l : q * g_of(l));
    else row.forward_kl += p;  // q g(l) where q is 0: p - q - q l
    if (has_p && (!has_q || parts[i].reverse_kl == INFINITY)) row.reverse_kl = INFINITY;
    else if (has_p) row.reverse_kl += p * parts[i].reverse_kl + (l < -1 ? (q - p) + p * l : p * g_of(-l));
    else row.reverse_kl += q;
    if (has_p) row.entropy += p * (parts[i].entropy - log_p(i));
    if (has_q) row.reference_entropy += q * (parts[i].reference_entropy - log_q(i));
    row.logit_sum += parts[i].logit_sum;
    row.tokens += parts[i].tokens;
  }
  if (bad_policy) lose_policy(row);
  if (bad_reference) lose_reference(row);
  return row;
}

}  // namespace fusedkl
