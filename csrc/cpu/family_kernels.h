// The second sweep, over blocks that the first one left in cache, and its
// gradient. The formulas stand in family_math.h. Included once per instruction
// set, after gradient.h.
#pragma once

#include "../family_terms.h"

namespace fusedkl {
namespace {

// Lanes of float.
struct LaneOps {
  using V = vf;
  using M = vm;
  SIMD_INLINE V set(double v) { return set1(static_cast<float>(v)); }
  SIMD_INLINE V select(M m, V yes, V no) { return fusedkl::select(m, yes, no); }
  SIMD_INLINE M not_above(V a, V b) { return fusedkl::not_above(a, b); }
  SIMD_INLINE V abs(V a) { return abs1(a); }
  SIMD_INLINE V fma(V a, V b, V c) { return fusedkl::fma(a, b, c); }
  SIMD_INLINE V exp2_of(V u) { return exp2_lanes(u); }
  SIMD_INLINE V one_minus_exp(V u) { return set1(0.f) - expm1_lanes(split_exponential(set1(0.f) - u)); }
  SIMD_INLINE Decay<LaneOps> decay(V u) {
    const V zero = set1(0.f), infinite = set1(-INFINITY);
    const Split e = split_exponential(zero - min2(set(kFarthest), u));
    return {fusedkl::select(not_above(u, set(kLeast)), infinite, zero - expm1_lanes(e)), fma(e.s, e.q + e.r, e.s)};
  }

  // h(z) = z - log1p(z), z > -1. With 1 + z = 2^k (1 + f): z - f - k ln2 +
  // h(f), and h(f) = f s - 2 s^3 (1/3 + s^2/5 + ...), s = f / (2 + f). For k =
  // 0, f is z itself: small z keep their digits.
  SIMD_INLINE V h(V z) {
    const vf w = z + set1(1.f), k = exponent_of(w), zero = set1(0.f);
    const vf f = fusedkl::select(equal(k, zero), z, w * pow2_int(zero - k) - set1(1.f));
    const vf s = f / (f + set1(2.f)), s2 = s * s;
    vf tail = set1(2.f / 11);
    tail = fma(tail, s2, set1(2.f / 9));
    tail = fma(tail, s2, set1(2.f / 7));
    tail = fma(tail, s2, set1(2.f / 5));
    tail = fma(tail, s2, set1(2.f / 3));
    return fnma(k, set1(static_cast<float>(kLn2)), (z - f) + fnma(s * s2, tail, f * s));
  }
};

struct FamilyFrame {
  GradientFrame f;
  explicit FamilyFrame(const GradientJob& job) : f(job) {}

  template <DType D, Family F>
  __attribute__((always_inline)) FamilyToken<LaneOps> token(vf x, vf y) const {
    const vf absent = set1(-INFINITY), zero = set1(0.f);
    const vf own = policy_logit<D>(x, y);
    const vm no_x = equal(own, absent), no_y = equal(y, absent), neither = mask_and(no_x, no_y);
    const vf far = LaneOps::set(farthest(F));
    vf l = gradient_difference<D>(x, y, f.ratio_hi, f.ratio_lo) * f.inv_t;
    l = zero_unless(mask_not(neither), select(no_x, zero - far, select(no_y, far, l)));
    const vf v = min2(far, abs1(l));
    const vm policy_big = mask_not(not_above(l, zero));
    const Split e = split_exponential(zero - min2(LaneOps::set(kFarthest), v));
    const vf exponent = fma_exact(select(policy_big, own, y), f.log2e, select(policy_big, f.shift_x, f.shift_y));
    const vf weight = select(policy_big, f.weight_x, f.weight_y);
    return {policy_big,
            select(policy_big, v, zero - v),
            v,
            zero - expm1_lanes(e),
            fma(e.s, e.q + e.r, e.s),
            exp2_lanes(exponent) * weight,
            exponent,
            weight};
  }
};

template <int TERMS>
SIMD_INLINE vf series_at(const vf* coefficients, vf l) {
  vf sum = coefficients[TERMS - 1];
  for (int j = TERMS - 2; j >= 0; j--) sum = fma(sum, l, coefficients[j]);
  return sum;
}

// The series of a row, splatted, and up to which |l| they serve.
struct SeriesLanes {
  vf first[kSeriesTerms], second[kSeriesTerms], close_first[kCloseTerms], close_second[kCloseTerms];
  vf close, near;

  SeriesLanes(const FamilySeries& s, double reach) : close(LaneOps::set(reach / 4)), near(LaneOps::set(reach)) {
    for (int j = 0; j < kCloseTerms; j++) close_first[j] = set1(s.close_first[j]), close_second[j] = set1(s.close_second[j]);
    for (int j = 0; j < kSeriesTerms; j++) first[j] = set1(s.first[j]), second[j] = set1(s.second[j]);
  }
};

template <DType D>
struct NearToken {
  vf l, magnitude;
  __attribute__((always_inline)) NearToken(const GradientFrame& f, vf x, vf y)
      : l(gradient_difference<D>(x, y, f.ratio_hi, f.ratio_lo) * f.inv_t), magnitude(abs1(l)) {}
};

template <DType D, Family F, bool MEND>
static FamilySums family_row(const GradientJob& job) {
  constexpr int64_t kSize = size_of(D);
  constexpr bool kNearPath = F != Family::tvd && !MEND;
  const FamilyFrame frame(job);
  const GradientFrame& f = frame.f;
  const FamilyConstants<LaneOps> c(job.kind);
  const SeriesLanes series(kNearPath ? family_sums_series(job.kind) : FamilySeries{}, series_reach(job.kind));
  FamilySums out;
  for (int64_t i = 0; i < job.n; i += kBlock) {
    vf acc[2][5];  // value, both slopes, sums of p - q and of q - p
    for (int k = 0; k < 10; k++) acc[k & 1][k >> 1] = set1(0.f);
    sweep<D>(static_cast<const char*>(job.x) + i * kSize, static_cast<const char*>(job.y) + i * kSize,
             job.n - i < kBlock ? job.n - i : kBlock, [&](int group, vf x, vf y, vf keep, bool tail) STEP_INLINE {
               vf* const a = acc[group];
               if constexpr (kNearPath) {
                 const NearToken<D> t(f, x, y);
                 if (all(not_above(t.magnitude,
                                   series.near))) {  // NaN: -inf in both rows, is not near
                   vf q = exp2_lanes(fma_exact(y, f.log2e, f.shift_y)) * f.weight_y;
                   if (tail) q = q * keep;
                   const bool close = all(not_above(t.magnitude, series.close));
                   const vf value =
                       close ? series_at<kCloseTerms>(series.close_first, t.l) : series_at<kSeriesTerms>(series.first, t.l);
                   const vf slope =
                       close ? series_at<kCloseTerms>(series.close_second, t.l) : series_at<kSeriesTerms>(series.second, t.l);
                   a[0] = fma(q, value, a[0]);
                   a[1] = fma(q, slope, a[1]);
                   if constexpr (F == Family::mixture) a[2] = fma(q, value - slope, a[2]);
                   return;
                 }
               }
               FamilyToken<LaneOps> t = frame.token<D, F>(x, y);
               if (tail) t.big = t.big * keep;
               const auto terms = family_terms<F>(c, t);
               a[0] = a[0] + terms.value;
               a[1] = a[1] + terms.policy;
               a[2] = a[2] + terms.reference;
               if constexpr (F == Family::tvd || MEND) {
                 const vf apart = t.big * t.d;
                 a[3] = a[3] + zero_unless(t.policy_big, apart);
                 a[4] = a[4] + zero_unless(mask_not(t.policy_big), apart);
               }
             });
    double sums[5];
    for (int k = 0; k < 5; k++) sums[k] = sum_lanes(acc[0][k] + acc[1][k]);
    out.add({sums[0], sums[1], sums[2], sums[3] + sums[4], sums[3] - sums[4]});
  }
  return out;
}

template <DType D>
static FamilySums family_sums(const GradientJob& job) {
  [[maybe_unused]] const FlushSubnormals scope;
  const bool mend = may_want_mending(job.state);
  return family_switch(job.kind, [&](auto f) {
    return mend ? family_row<D, decltype(f)::value, true>(job) : family_row<D, decltype(f)::value, false>(job);
  });
}

template <DType D, Family F>
static void family_gradient_row(const GradientJob& job) {
  const FamilyFrame frame(job);
  const FamilyConstants<LaneOps> c(job.kind);
  const RowGradient& g = job.gradient;
  const vf to_policy = LaneOps::set(g.divergence), to_reference = LaneOps::set(g.ref_divergence);
  const vf mass = LaneOps::set(g.mass), uniform = LaneOps::set(g.uniform);
  const vf policy_mean = LaneOps::set(job.state.policy_slope), reference_mean = LaneOps::set(job.state.reference_slope);
  const vf value = LaneOps::set(gradient_value(job.kind, job.state)), absent = set1(-INFINITY);
  const bool alone = g.mass != 0 || g.uniform != 0;
  constexpr bool kNearPath = F != Family::tvd;
  constexpr bool kCoarse = stored(D) != DType::f32;
  [[maybe_unused]] constexpr int kTerms = kCoarse ? kCoarseTerms : kSeriesTerms;
  [[maybe_unused]] constexpr int kFewTerms = kCoarse ? kCoarseCloseTerms : kCloseTerms;
  const SeriesLanes series(kNearPath ? family_gradient_series(job, kCoarse) : FamilySeries{}, series_reach(job.kind));
  auto token = [&](vf x, vf y, vf& gx, vf& gy) STEP_INLINE {
    if constexpr (kNearPath) {
      const NearToken<D> t(frame.f, x, y);
      if (all(not_above(t.magnitude, series.near))) {
        const vf q = exp2_for_store<D>(fma_exact(y, frame.f.log2e, frame.f.shift_y)) * frame.f.weight_y;
        const bool close = all(not_above(t.magnitude, series.close));
        gx = q * (close ? series_at<kFewTerms>(series.close_first, t.l) : series_at<kTerms>(series.first, t.l));
        if (alone) gx = gx + uniform;
        if (job.gy) gy = q * (close ? series_at<kFewTerms>(series.close_second, t.l) : series_at<kTerms>(series.second, t.l));
        return;
      }
    }
    const FamilyToken<LaneOps> t = frame.token<D, F>(x, y);
    const auto terms = family_gradient_terms<F>(c, t, policy_mean, reference_mean, value);
    gx = to_policy * terms.policy;
    if (alone) gx = gx + zero_unless(mask_not(equal(policy_logit<D>(x, y), absent)), fma(mass, t.p(), uniform));
    gy = to_reference * terms.reference;
  };
  map_row<D>(job.x, job.y, job.gx, job.gy, job.n, [&](vf x0, vf x1, vf y0, vf y1, vf& a0, vf& a1, vf& b0, vf& b1) STEP_INLINE {
    b0 = b1 = set1(0.f);
    token(x0, y0, a0, b0);
    token(x1, y1, a1, b1);
  });
}

// In a peaked row a slope less its mean is a small rest of both: what their own
// sum is off 0 belongs to the means.
template <DType D>
static void refine_slopes(GradientJob& job) {
  const FamilyFrame frame(job);
  const FamilyConstants<LaneOps> c(job.kind);
  constexpr int64_t kSize = size_of(D);
  const vf policy_mean = LaneOps::set(job.state.policy_slope), reference_mean = LaneOps::set(job.state.reference_slope);
  double policy = 0, reference = 0;
  for (int64_t i = 0; i < job.n; i += kBlock) {
    vf sx[2] = {set1(0.f), set1(0.f)}, sy[2] = {set1(0.f), set1(0.f)};
    sweep<D>(static_cast<const char*>(job.x) + i * kSize, static_cast<const char*>(job.y) + i * kSize,
             job.n - i < kBlock ? job.n - i : kBlock, [&](int group, vf x, vf y, vf keep, bool) STEP_INLINE {
               const FamilyToken<LaneOps> t = frame.token<D, Family::mixture>(x, y);
               const auto terms = family_gradient_terms<Family::mixture>(c, t, policy_mean, reference_mean, keep);
               sx[group] = sx[group] + terms.policy * keep;
               sy[group] = sy[group] + terms.reference * keep;
             });
    policy += sum_lanes(sx[0] + sx[1]);
    reference += sum_lanes(sy[0] + sy[1]);
  }
  job.state.policy_slope += policy;
  job.state.reference_slope += reference;
}

template <DType D>
static void family_gradient(GradientJob job) {
  [[maybe_unused]] const FlushSubnormals scope;
  if (stored(D) == DType::f32 && is_peaked(job.state) && job.state.whole != 0 && job.kind.family == Family::mixture)
    refine_slopes<D>(job);
  family_switch(job.kind, [&](auto f) { family_gradient_row<D, decltype(f)::value>(job); });
}

}  // namespace
}  // namespace fusedkl
