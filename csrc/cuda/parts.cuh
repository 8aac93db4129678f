// From fp32 sums to a segment's RowState. A stretch of tiles that shared one anchor is a part; parts are moved to one centre
// and added in double, one part per lane.
#pragma once
#include "sums.cuh"

namespace fusedkl {
namespace gpu {

struct Part {
  CentredSums sums;
  double exponent, centre;
  double noise;  // sum of |B| as accumulated: what fp32 rounding is relative to
  EntropySums policy, reference;
  double policy_top, reference_top;  // the logits that the entropies' sums are about
};

FUSEDKL_DEVICE Part no_part() {
  Part p{};
  p.exponent = p.policy_top = p.reference_top = -INFINITY;
  return p;
}

// The sums of a warp over a stretch of tiles, as the loop leaves them in shared memory.
struct Stretch {
  Anchor anchor;
  float reference, policy, a, b, c, policy_log, reference_log;
  int policy_ties, reference_ties;
};

// The same in all lanes. The loop keeps no double: its registers are full.
template <int MODE>
FUSEDKL_DEVICE Stretch stretch_of(const LaneSums& s, const Anchor& anchor) {
  Stretch out{};
  out.anchor = anchor;
  out.reference = warp_sum(fold(s.reference));
  out.policy = warp_sum(fold(s.policy));
  out.a = warp_sum(fold(s.a));
  out.b = warp_sum(fold(s.b));
  if constexpr ((MODE & kReverse) != 0) out.c = warp_sum(fold(s.c));
  if constexpr ((MODE & kEntropy) != 0) {
    out.policy_log = warp_sum(fold(s.policy_log));
    out.policy_ties = warp_sum(s.policy_ties);
  }
  if constexpr ((MODE & kReferenceEntropy) != 0) {
    out.reference_log = warp_sum(fold(s.reference_log));
    out.reference_ties = warp_sum(s.reference_ties);
  }
  return out;
}

// The policy's own sum may be NaN, where nothing needs it: part_of() looks.
FUSEDKL_DEVICE bool usable(const Stretch& s) {
  return is_finite((s.reference + (s.a + s.b)) + (s.c + (s.policy_log + s.reference_log)));
}

// No token was added; a NaN is something.
FUSEDKL_DEVICE bool is_nothing(const Stretch& s) { return s.reference == 0 && s.policy == 0 && s.a == 0 && s.b == 0 && s.c == 0; }

template <int MODE>
FUSEDKL_DEVICE Part part_of(const Stretch& s, const Temperature& t) {
  Part p = no_part();
  p.exponent = s.anchor.exponent;
  p.centre = static_cast<double>(s.anchor.centre) + s.anchor.fine;
  double policy = s.policy;
  p.sums.S = s.reference;
  p.sums.A = static_cast<double>(s.a) * t.inv_t;
  p.sums.B = s.b;
  p.sums.C = s.c;
  // with the largest logits' own weights, which these sums leave out
  auto entropy = [](double rest, double log_sum, int ties, double top_log, EntropySums& e) {
    const double top = exp2(top_log);
    e.ties = ties;
    e.rest = rest / top;
    e.gap = (top_log * rest - log_sum) * kLn2 / top;
    return ties * top;
  };
  if constexpr ((MODE & kEntropy) != 0) {
    p.policy_top = s.anchor.policy_top;
    if (p.policy_top > -INFINITY)
      policy += entropy(s.policy, s.policy_log, s.policy_ties, (p.policy_top - p.centre) * t.slope - p.exponent, p.policy);
  }
  if constexpr ((MODE & kReferenceEntropy) != 0) {
    p.reference_top = s.anchor.reference_top;
    if (p.reference_top > -INFINITY)
      p.sums.S += entropy(s.reference, s.reference_log, s.reference_ties, p.reference_top * t.slope - p.exponent, p.reference);
  }
  p.noise = p.sums.B;
  // near the centre the policy's mass comes out of A and B to full accuracy, far from it only out of its own sum
  const double moved = p.sums.A + p.sums.B;
  p.sums.M = fabs(p.sums.A) + p.sums.B < 0.5 * p.sums.S ? moved : policy - p.sums.S;
  return p;
}

template <int MODE>
FUSEDKL_DEVICE bool usable(const Part& p) {
  bool entropies = true;
  if constexpr ((MODE & kEntropy) != 0) entropies &= is_finite(p.policy.rest + p.policy.gap);
  if constexpr ((MODE & kReferenceEntropy) != 0) entropies &= is_finite(p.reference.rest + p.reference.gap);
  return is_finite((p.sums.S + p.sums.A) + (p.sums.B + p.sums.C) + p.sums.M) && entropies;
}

FUSEDKL_DEVICE double warp_max(double v) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o >>= 1) v = fmax(v, __shfl_xor_sync(kAllLanes, v, o));
  return v;
}

FUSEDKL_DEVICE void gather_entropy(EntropySums& e, double& top, const Temperature& t) {
  const double highest = warp_max(top);
  if (top > -INFINITY && top < highest) e.raise((highest - top) * t.inverse);
  top = highest;
  e.ties = warp_sum(e.ties);
  e.rest = warp_sum(e.rest);
  e.gap = warp_sum(e.gap);
}

// The sum of the lanes' parts, about the centre of the heaviest; the same in all lanes. Addition is in a fixed order.
template <int MODE>
FUSEDKL_DEVICE Part gather(Part p, const Temperature& t) {
  const bool has = p.sums.S > 0;
  const double weight = has ? log2(p.sums.S) + p.exponent : -INFINITY, heaviest = warp_max(weight);
  const unsigned holders = __ballot_sync(kAllLanes, has && weight == heaviest);
  if (holders != 0) {
    const int lane = __ffs(static_cast<int>(holders)) - 1;
    const double exponent = __shfl_sync(kAllLanes, p.exponent, lane), centre = __shfl_sync(kAllLanes, p.centre, lane);
    if (p.exponent > -INFINITY) {  // also one whose reference weights are all too small for a float
      const double step = (centre - p.centre) * t.inverse, factor = exp2(p.exponent - exponent);
      p.sums.scale(factor);
      p.noise *= factor;
      if (step != 0) {
        p.sums.recentre(step);
        p.noise *= exp(-step);
      }
    }
    p.exponent = exponent;
    p.centre = centre;
  }
  p.sums.S = warp_sum(p.sums.S);
  p.sums.A = warp_sum(p.sums.A);
  p.sums.B = warp_sum(p.sums.B);
  p.sums.M = warp_sum(p.sums.M);
  p.noise = warp_sum(p.noise);
  if constexpr ((MODE & kReverse) != 0) p.sums.C = warp_sum(p.sums.C);
  if constexpr ((MODE & kEntropy) != 0) gather_entropy(p.policy, p.policy_top, t);
  if constexpr ((MODE & kReferenceEntropy) != 0) gather_entropy(p.reference, p.reference_top, t);
  return p;
}

// A segment that the fast sums cannot vouch for, left to the exact kernel. No RowState looks like this.
FUSEDKL_HD static inline RowState left_to_exact() {
  RowState s{};
  s.policy_log_sum = INFINITY;
  return s;
}
FUSEDKL_HD static inline bool is_left_to_exact(const RowState& s) { return s.policy_log_sum == INFINITY; }

// The segment's numbers, or left_to_exact() where rounding may show in them.
template <int MODE, DType X, DType Y>
FUSEDKL_DEVICE RowState state_of(Part p, const Temperature& t) {
  if (!usable<MODE>(p) || !(p.sums.S > 0)) return left_to_exact();
  for (int i = 0; i < 2 && p.sums.off_centre(); i++) {
    const double step = p.sums.A / p.sums.S;
    if (!(fabs(step) < 80)) return left_to_exact();
    p.sums.recentre(step);
    p.noise *= exp(-step);
    p.centre += step / t.inverse;
  }
  RowState s{};
  s.forward_kl = p.sums.forward_kl();
  s.reverse_kl = (MODE & kReverse) != 0 ? p.sums.reverse_kl() : s.forward_kl;
  const double policy = p.sums.policy_mass();
  if (!kExactDifference<X, Y> && difference_too_coarse(p.centre * t.inverse, s.forward_kl)) return left_to_exact();
  if (!(p.sums.A == 0 && p.sums.B == 0)) {  // else every difference is the centre
    if (!(p.noise <= 8 * policy * s.forward_kl)) return left_to_exact();
    if constexpr ((MODE & kReverse) != 0) {
      const double kept = fabs(p.sums.M) > 0.5 * p.sums.S ? fabs(p.sums.M + p.sums.C) : 0;
      if (!(fmax(fabs(p.sums.C), kept) <= 10 * s.reverse_kl * policy)) return left_to_exact();
    }
  }
  s.centre = p.centre;
  s.residual = p.sums.log_ratio_about_centre();
  s.reference_max = p.exponent / t.slope * t.inverse;
  s.reference_log_sum = log(p.sums.S);
  s.policy_max = s.reference_max + p.centre * t.inverse;
  s.policy_log_sum = s.reference_log_sum + s.residual;
  if constexpr ((MODE & kEntropy) != 0) {
    s.policy_max = p.policy_top * t.inverse;
    s.policy_log_sum = log_mass(p.policy.ties, p.policy.rest);
    s.entropy = entropy_of(p.policy.ties, p.policy.rest, p.policy.gap);
  }
  if constexpr ((MODE & kReferenceEntropy) != 0) {
    s.reference_max = p.reference_top * t.inverse;
    s.reference_log_sum = log_mass(p.reference.ties, p.reference.rest);
    s.reference_entropy = entropy_of(p.reference.ties, p.reference.rest, p.reference.gap);
  }
  return s;
}

}  // namespace gpu
}  // namespace fusedkl
