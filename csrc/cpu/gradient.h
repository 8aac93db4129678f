// Gradient sweeps: read the logits once more, write each gradient once. Nothing of the forward but RowState is needed.
// Included once per instruction set, after block_kernels.h.
#pragma once

#include "gradient_frame.h"

namespace fusedkl {
namespace {

// Calls chunk(x0, x1, y0, y1) -> (gx0, gx1, gy0, gy1) over the row. Loads of a chunk come before its stores, so a gradient may
// replace its own logits. The tail goes through a buffer: no instruction depends on where the row ends or is aligned.
template <DType D, class Chunk>
SIMD_INLINE void map_row(const void* x, const void* y, void* gx, void* gy, int64_t n, Chunk chunk) {
  constexpr int64_t kSize = size_of(D);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    vf x0, x1, y0, y1, a0, a1, b0, b1;
    load2<stored(D)>(x, i, x0, x1);
    load2<stored(D)>(y, i, y0, y1);
    chunk(x0, x1, y0, y1, a0, a1, b0, b1);
    if (gx) store2<stored(D)>(gx, i, a0, a1);
    if (gy) store2<stored(D)>(gy, i, b0, b1);
  }
  if (i == n) return;
  const size_t bytes = static_cast<size_t>((n - i) * kSize);
  alignas(64) unsigned char tx[kStep * kSize] = {}, ty[kStep * kSize] = {};
  memcpy(tx, static_cast<const char*>(x) + i * kSize, bytes);
  memcpy(ty, static_cast<const char*>(y) + i * kSize, bytes);
  vf x0, x1, y0, y1, a0, a1, b0, b1;
  load2<stored(D)>(tx, 0, x0, x1);
  load2<stored(D)>(ty, 0, y0, y1);
  chunk(x0, x1, y0, y1, a0, a1, b0, b1);
  if (gx) {
    store2<stored(D)>(tx, 0, a0, a1);
    memcpy(static_cast<char*>(gx) + i * kSize, tx, bytes);
  }
  if (gy) {
    store2<stored(D)>(ty, 0, b0, b1);
    memcpy(static_cast<char*>(gy) + i * kSize, ty, bytes);
  }
}

// gx = forward * q * expm1(l): the hot one. q carries `forward` already.
template <DType D>
SIMD_INLINE vf forward_far(const GradientFrame& f, vf x, vf q, vf l, vf scale) {
  const vm small = not_above(abs1(l), set1(kNear));
  const vf p = exp2_lanes(fma_exact(x, f.log2e, f.shift_x)) * (f.weight_x * scale);
  return select(small, q * expm1_lanes(split_exponential(zero_unless(small, l))), p - q);  // -inf in both rows: 0 - 0
}

// Two vectors at a time, by the cheapest form that all their tokens allow; `small` holds for |l| <= reach.
template <DType D, class Small>
static void forward_gradient_by(const GradientJob& job, const GradientFrame& f, const Small& small, double reach) {
  const vf scale = set1(static_cast<float>(job.gradient.forward)), weight = f.weight_y * scale;
  const double t = 1 / job.inv_t;
  // beyond these temperatures the coefficients of `small` leave fp32, and no token takes it
  const bool ordinary = job.inv_t <= 1e3 && job.inv_t >= 1e-3;
  const vf within = set1(ordinary ? static_cast<float>(reach * reach * t * t) : -1.f), near = set1(static_cast<float>(kNear * t));
  map_row<D>(job.x, job.y, job.gx, nullptr, job.n, [&](vf x0, vf x1, vf y0, vf y1, vf& a0, vf& a1, vf&, vf&) STEP_INLINE {
    const vf v0 = gradient_difference<D>(x0, y0, f.ratio_hi, f.ratio_lo),
             v1 = gradient_difference<D>(x1, y1, f.ratio_hi, f.ratio_lo);
    const vf e0 = exp2_for_store<D>(fma_exact(y0, f.log2e, f.shift_y)), e1 = exp2_for_store<D>(fma_exact(y1, f.log2e, f.shift_y));
    // the sum of squares bounds both, and a NaN fails every comparison
    if (all(not_above(fma(v0, v0, v1 * v1), within))) {
      a0 = e0 * small(v0);
      a1 = e1 * small(v1);
      return;
    }
    const vf q0 = e0 * weight, q1 = e1 * weight;
    if (all(mask_and(not_above(abs1(v0), near), not_above(abs1(v1), near)))) {
      a0 = q0 * expm1_lanes(split_exponential(v0 * f.inv_t));
      a1 = q1 * expm1_lanes(split_exponential(v1 * f.inv_t));
    } else {
      a0 = forward_far<D>(f, policy_logit<D>(x0, y0), q0, v0 * f.inv_t, scale);
      a1 = forward_far<D>(f, policy_logit<D>(x1, y1), q1, v1 * f.inv_t, scale);
    }
  });
}

template <DType D>
static void forward_gradient(const GradientJob& job) {
  const GradientFrame f(job);
  const double weight = f.weight * job.gradient.forward;
  if constexpr (stored(D) == DType::f32) {
    forward_gradient_by<D>(job, f, ScaledExpm1<6>(kPoly6, job.inv_t, weight), 1);
  } else if (job.state.forward_kl < 1e-3) {  // hardly a token of such a row is further off
    forward_gradient_by<D>(job, f, ScaledExpm1<2>(kCoarse2, job.inv_t, weight), 0.25);
  } else {
    forward_gradient_by<D>(job, f, ScaledExpm1<3>(kCoarse3, job.inv_t, weight), 1);
  }
}

// Means of x - y under each distribution: T (l - R) = (x - y) - policy, T (l + F) = (x - y) - reference.
struct Means {
  Centre policy, reference;
};

// One more sweep measures what the means lack.
template <DType D>
static void refine_means(const GradientJob& job, Means& m) {
  const GradientFrame f(job);
  constexpr int64_t kSize = size_of(D);
  const vf absent = set1(-INFINITY);
  vf p_hi, p_lo, q_hi, q_lo;
  GradientFrame::splat_centre(m.policy, p_hi, p_lo);
  GradientFrame::splat_centre(m.reference, q_hi, q_lo);
  double sums[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < job.n; i += kBlock) {
    vf acc[2][4];
    for (int k = 0; k < 8; k++) acc[k & 1][k >> 1] = set1(0.f);
    sweep<D>(static_cast<const char*>(job.x) + i * kSize, static_cast<const char*>(job.y) + i * kSize,
             job.n - i < kBlock ? job.n - i : kBlock, [&](int group, vf x, vf y, vf keep, bool) STEP_INLINE {
               vf* const a = acc[group];
               const vf own = policy_logit<D>(x, y);
               const vm both = mask_not(mask_or(equal(own, absent), equal(y, absent)));
               const vf wx = zero_unless(both, exp2_lanes(fma_exact(own, f.log2e, f.shift_x)) * keep);
               const vf wy = zero_unless(both, exp2_lanes(fma_exact(y, f.log2e, f.shift_y)) * keep);
               a[0] = a[0] + wx;
               a[1] = fma(wx, zero_unless(both, gradient_difference<D>(x, y, p_hi, p_lo)), a[1]);
               a[2] = a[2] + wy;
               a[3] = fma(wy, zero_unless(both, gradient_difference<D>(x, y, q_hi, q_lo)), a[3]);
             });
    for (int k = 0; k < 4; k++) sums[k] += sum_lanes(acc[0][k] + acc[1][k]);
  }
  if (sums[0] > 0) m.policy.rest += sums[1] / sums[0];
  if (sums[2] > 0) m.reference.rest += sums[3] / sums[2];
}

// expm1(l) for |l| <= 1, as a store of D asks for it.
template <DType D>
SIMD_INLINE vf near_expm1(vf l) {
  constexpr bool kExact = stored(D) == DType::f32;
  const float* const c = kExact ? kPoly6 : kCoarse3;
  constexpr int kDegree = kExact ? 6 : 3;
  vf P = set1(c[kDegree]);
  for (int j = kDegree - 1; j >= 0; j--) P = fma(P, l, set1(c[j]));
  return fma(l * l, P, l);
}

// Everything of RowGradient at once, for the policy, and with REFERENCE for the reference too.
template <DType D, bool REFERENCE>
static void general_gradient(const GradientJob& job, const Means& m) {
  const GradientFrame f(job);
  const RowGradient& g = job.gradient;
  const vf forward = set1(static_cast<float>(g.forward)), reverse = set1(static_cast<float>(g.reverse)),
           mass = set1(static_cast<float>(g.mass));
  const vf information = set1(static_cast<float>(g.information)), ref_forward = set1(static_cast<float>(g.ref_forward));
  const vf ref_reverse = set1(static_cast<float>(g.ref_reverse)), absent = set1(-INFINITY), zero = set1(0.f);
  const vf H = set1(static_cast<float>(job.state.entropy)), uniform = set1(static_cast<float>(g.uniform));
  const vf ref_mass = set1(static_cast<float>(g.ref_mass)), ref_information = set1(static_cast<float>(g.ref_information));
  const vf ref_H = set1(static_cast<float>(job.state.reference_entropy));
  const bool alone = g.mass != 0 || g.information != 0 || g.uniform != 0;
  const bool ref_alone = REFERENCE && (g.ref_mass != 0 || g.ref_information != 0);
  vf p_hi, p_lo, q_hi, q_lo;
  GradientFrame::splat_centre(m.policy, p_hi, p_lo);
  GradientFrame::splat_centre(m.reference, q_hi, q_lo);
  // log p + H and log q + H
  auto excess_x = [&](vf x) STEP_INLINE { return bounded((x - f.max_x) * f.inv_t - f.log_sum_x) + H; };
  auto excess_y = [&](vf y) STEP_INLINE { return bounded((y - f.max_y) * f.inv_t - f.log_sum_y) + ref_H; };
  auto token = [&](vf x, vf y, vf& gx, vf& gy) STEP_INLINE {
    const vf own = policy_logit<D>(x, y);
    const vm has_x = mask_not(equal(own, absent)), has_y = mask_not(equal(y, absent)), both = mask_and(has_x, has_y);
    const vf l = zero_unless(both, gradient_difference<D>(x, y, f.ratio_hi, f.ratio_lo) * f.inv_t);
    const vm near = mask_and(both, not_above(abs1(l), set1(kNear)));
    const vf q = exp2_lanes(fma_exact(y, f.log2e, f.shift_y)) * f.weight_y;
    const Split e = split_exponential(zero_unless(near, l));
    vf moved = q * expm1_lanes(e), p = q * fma(e.s, e.q + e.r, e.s);  // p - q and p = q e^l, each without cancelling
    if (!all(near)) {
      const vf far = exp2_lanes(fma_exact(own, f.log2e, f.shift_x)) * f.weight_x;
      p = select(near, p, far);
      moved = select(near, moved, far - q);
    }
    const vf above_p = zero_unless(both, bounded(gradient_difference<D>(x, y, p_hi, p_lo) * f.inv_t));  // l - R
    gx = fma(forward, moved, (p * above_p) * reverse);
    if (alone) gx = fma(p * zero_unless(has_x, excess_x(own)), information, fma(p, mass, gx + uniform));
    gx = select(has_x, gx, select(has_y, forward * moved, zero));
    if constexpr (REFERENCE) {
      const vf above_q = zero_unless(both, bounded(gradient_difference<D>(x, y, q_hi, q_lo) * f.inv_t));  // l + F
      gy = fma(ref_reverse, moved, (q * above_q) * ref_forward);
      if (ref_alone) gy = fma(q * zero_unless(has_y, excess_y(y)), ref_information, fma(q, ref_mass, gy));
    }
  };
  // |l| <= 1, both logits finite
  auto near_token = [&](vf x, vf y, vf v, vf& gx, vf& gy) STEP_INLINE {
    const vf q = exp2_for_store<D>(fma_exact(y, f.log2e, f.shift_y)) * f.weight_y;
    const vf moved = q * near_expm1<D>(v * f.inv_t), p = q + moved;
    vf slope = (gradient_difference<D>(x, y, p_hi, p_lo) * f.inv_t) * reverse;
    if (alone) slope = fma(excess_x(policy_logit<D>(x, y)), information, slope + mass);
    gx = fma(forward, moved, fma(p, slope, uniform));
    if constexpr (REFERENCE) {
      vf own = (gradient_difference<D>(x, y, q_hi, q_lo) * f.inv_t) * ref_forward;
      if (ref_alone) own = fma(excess_y(y), ref_information, own + ref_mass);
      gy = fma(ref_reverse, moved, q * own);
    }
  };
  const float t = 1 / static_cast<float>(job.inv_t);
  const vf within = set1(t * t < 1e6f && t * t > 1e-6f ? t * t : -1.f);
  map_row<D>(job.x, job.y, job.gx, job.gy, job.n, [&](vf x0, vf x1, vf y0, vf y1, vf& a0, vf& a1, vf& b0, vf& b1) STEP_INLINE {
    if constexpr (!REFERENCE) b0 = b1 = zero;
    const vf v0 = gradient_difference<D>(x0, y0, f.ratio_hi, f.ratio_lo),
             v1 = gradient_difference<D>(x1, y1, f.ratio_hi, f.ratio_lo);
    if (all(not_above(fma(v0, v0, v1 * v1), within))) {  // a NaN is not
      near_token(x0, y0, v0, a0, b0);
      near_token(x1, y1, v1, a1, b1);
    } else {
      token(x0, y0, a0, b0);
      token(x1, y1, a1, b1);
    }
  });
}

// No reference: gx = p (mass + information (log p + H)) + uniform
template <DType D>
static void single_gradient(const GradientJob& job) {
  const GradientFrame f(job);
  const vf mass = set1(static_cast<float>(job.gradient.mass)), information = set1(static_cast<float>(job.gradient.information));
  const vf H = set1(static_cast<float>(job.state.entropy)), absent = set1(-INFINITY);
  const bool entropy = job.gradient.information != 0, everywhere = job.gradient.uniform != 0;
  const vf uniform = set1(static_cast<float>(job.gradient.uniform));
  auto token = [&](vf x) STEP_INLINE {
    const vf p = exp2_for_store<D>(fma_exact(x, f.log2e, f.shift_x)) * f.weight_x;
    if (!entropy && !everywhere) return p * mass;
    const vf rest = fma(p, mass, zero_unless(mask_not(equal(x, absent)), uniform));
    if (!entropy) return rest;
    const vf log_p = bounded((x - f.max_x) * f.inv_t - f.log_sum_x);
    return fma(p * zero_unless(mask_not(equal(x, absent)), log_p + H), information, rest);
  };
  map_row<D>(job.x, job.x, job.gx, nullptr, job.n, [&](vf x0, vf x1, vf, vf, vf& a0, vf& a1, vf&, vf&) STEP_INLINE {
    a0 = token(x0);
    a1 = token(x1);
  });
}

template <DType D>
static Lacking lacking(const GradientJob& job, bool slice) {
  const RowState& s = job.state;
  // The forward sweep's maximum is that of a sample.
  auto peaked = [&] {
    return max_policy<D>(job.x, job.y, job.n) * job.inv_t - s.policy_max > s.policy_log_sum - 0.7 ||
           max_block<stored(D)>(job.y, job.n) * job.inv_t - s.reference_max > s.reference_log_sum - 0.7;
  };
  return lacking_where(job, slice, stored(D) == DType::f32, peaked);
}

static Means means_of(const GradientJob& job) {
  const RowState& s = job.state;
  const FiniteKls kl(s);
  const double t = 1 / job.inv_t;
  return {{s.centre, (s.residual + kl.R) * t}, {s.centre, (s.residual - kl.F) * t}};
}

static void set_ratio(RowState& s, const Means& m, double inv_t) {
  s.centre = m.reference.base;
  s.residual = s.forward_kl + m.reference.rest * inv_t;
}

// The log-ratio by the masses beside the top tokens, where they are known better than the divergence. Of whole rows: a slice's
// gradient to the reference makes the mean of the differences of the log-ratio and the divergence, whose rounding must be in both.
template <DType D>
static bool set_ratio_by_masses(GradientJob& job) {
  if constexpr (stored(D) == DType::f32) {
    const RowState x = policy_segment<D>(job.x, job.y, job.n, job.inv_t, true);
    const RowState y = single_segment<DType::f32>(job.y, job.n, job.inv_t, true);
    if (fmax(x.policy_log_sum, y.policy_log_sum) < few_others(job.state.forward_kl)) {
      job.state.centre = (x.policy_max - y.policy_max) / job.inv_t;
      job.state.residual = x.policy_log_sum - y.policy_log_sum;
      return true;
    }
  }
  return false;
}

// What a gradient over the whole row would find out by itself, for the state of a row that will be a slice of a longer one.
template <DType D>
static void sharpen_state(GradientJob job, RowState& out) {
  [[maybe_unused]] const FlushSubnormals scope;
  const Lacking lack = lacking<D>(job, true);
  if (!lack.any()) return;
  Means m = means_of(job);
  refine_means<D>(job, m);
  if (lack.ratio) {
    set_ratio(out, m, job.inv_t);
  } else if (out.forward_kl + out.reverse_kl > 0.02) {  // a smaller value is known better by its own sum than by its mean
    if (is_finite(out.forward_kl)) out.forward_kl = fmax(0, out.residual - m.reference.rest * job.inv_t);
    if (is_finite(out.reverse_kl) && out.reverse_kl > 0) out.reverse_kl = fmax(0, m.policy.rest * job.inv_t - out.residual);
  }
}

// Whether gradient_row of the whole row does more than gradient_row of its parts.
template <DType D>
static bool needs_whole_row(const GradientJob& job) {
  return job.y && job.state.whole != 0 && lacking<D>(job, false).any();
}

template <DType D>
static void gradient_row(GradientJob job) {
  [[maybe_unused]] const FlushSubnormals scope;
  const RowGradient& g = job.gradient;
  if (!job.y) return single_gradient<D>(job);
  Means m = means_of(job);
  // the mean over a slice would be another mean
  Lacking lack = job.state.whole != 0 ? lacking<D>(job, false) : Lacking{};
  if (lack.ratio && set_ratio_by_masses<D>(job)) lack.ratio = false;
  if (lack.any()) refine_means<D>(job, m);
  if (lack.ratio) set_ratio(job.state, m, job.inv_t);
  if (!job.gy && g.reverse == 0 && g.mass == 0 && g.information == 0 && g.uniform == 0) forward_gradient<D>(job);
  else if (!job.gy) general_gradient<D, false>(job, m);
  else general_gradient<D, true>(job, m);
}

}  // namespace
}  // namespace fusedkl
