// What a gradient's sweep needs of its row, splatted, and its exponentials of small arguments.
// Included once per instruction set, after block_kernels.h.
#pragma once

#include "job.h"

namespace fusedkl {
namespace {

// A difference of logits in two parts: where the top token of a peaked row is compared with a mean that is nearly its own
// difference, one double has too few digits.
struct Centre {
  double base, rest;
};

// Constants of a row, splatted. Logits and their log-ratio are centred in two floats before the scaling by 1/T.
struct GradientFrame {
  vf log2e, inv_t;
  vf ratio_hi, ratio_lo;  // T D
  vf shift_y, weight_y;   // q = 2^(y log2e - shift_y) * weight_y
  float weight;           // one lane of weight_y
  vf shift_x, weight_x;   // p likewise, for tokens too far from the reference
  vf max_x, log_sum_x;    // log p = (x - max_x)/T - log_sum_x
  vf max_y, log_sum_y;    // log q likewise

  explicit GradientFrame(const GradientJob& job) {
    const RowState& s = job.state;
    const double t = 1 / job.inv_t;
    const float slope = static_cast<float>(kLog2e * job.inv_t);
    log2e = set1(slope);
    inv_t = set1(static_cast<float>(job.inv_t));
    splat_centre({s.centre, s.residual * t}, ratio_hi, ratio_lo);
    weight = splat_weight(s.reference_max, s.reference_log_sum, t, slope, shift_y, weight_y);
    splat_weight(s.policy_max, s.policy_log_sum, t, slope, shift_x, weight_x);
    splat_log_sum(s.policy_max, s.policy_log_sum, job.inv_t, max_x, log_sum_x);
    splat_log_sum(s.reference_max, s.reference_log_sum, job.inv_t, max_y, log_sum_y);
  }

  __attribute__((always_inline)) static inline void splat_log_sum(double max, double log_sum, double inv_t, vf& m, vf& rest) {
    const float rounded = static_cast<float>(max / inv_t);
    m = set1(rounded);
    rest = set1(static_cast<float>(log_sum + (max - rounded * inv_t)));
  }

  __attribute__((always_inline)) static inline void splat_centre(const Centre& c, vf& hi, vf& lo) {
    const double sum = c.base + c.rest;
    const float rounded = static_cast<float>(sum);
    hi = set1(rounded);
    lo = set1(is_finite(sum) ? static_cast<float>((c.base - rounded) + c.rest) : 0.f);
  }

  // 2^(v slope - shift) with a rounded shift; what the rounding took is in the weight, computed in double
  __attribute__((always_inline)) static inline float splat_weight(double max, double log_sum, double t, float slope, vf& shift,
                                                                  vf& weights) {
    const double m = max * t;
    const float rounded = static_cast<float>(m * slope), weight = static_cast<float>(exp2(rounded - m * slope) * exp(-log_sum));
    shift = set1(-rounded);
    weights = set1(weight);
    return weight;
  }
};

template <DType D>
SIMD_INLINE vf gradient_difference(vf x, vf y, vf hi, vf lo) {
  if constexpr (D == DType::f32) return exact_difference(x, y, hi, lo);
  return ((D == DType::apart ? x : x - y) - hi) - lo;
}

// a logit masked at finfo.min must not become 0 * inf; NaN stays
SIMD_INLINE vf bounded(vf v) { return max2(set1(-FLT_MAX), min2(set1(FLT_MAX), v)); }

template <DType D>
SIMD_INLINE vf exp2_for_store(vf t) {
  if constexpr (stored(D) == DType::f32) return exp2_lanes(t);
  return exp2_coarse(t);
}

// scale * expm1(v/T) for small |v/T|. Temperature and scale are folded into the coefficients, as in poly_block.
template <int DEGREE>
struct ScaledExpm1 {
  vf linear, c[DEGREE + 1];

  ScaledExpm1(const float (&coefficients)[DEGREE + 1], double inv_t, double scale) {
    linear = set1(static_cast<float>(scale * inv_t));
    double power = scale * inv_t * inv_t;
    for (int j = 0; j <= DEGREE; j++, power *= inv_t) c[j] = set1(static_cast<float>(coefficients[j] * power));
  }

  __attribute__((always_inline)) vf operator()(vf v) const {
    vf P = c[DEGREE];
    for (int j = DEGREE - 1; j >= 0; j--) P = fma(P, v, c[j]);
    return v * fma(P, v, linear);
  }
};

// For 16-bit results, which round by 2e-3: g(u)/u^2 so that expm1 is right to 9e-5 for |u| <= 1, and to 6e-6 for |u| <= 1/4.
constexpr float kCoarse3[] = {0.49963371f, 0.16679309f, 0.0433362f, 0.00835694f};
constexpr float kCoarse2[] = {0.500004485f, 0.16709825f, 0.0416370334f};

}  // namespace
}  // namespace fusedkl
