// The first launch of a backward, one block per row: everything that needs double. Constants of the row's sweep, gradients of
// the tokens whose log-probability was asked for (before the sweep may overwrite their logits), means that must be right to more
// digits than the state has, and the whole gradient of rows beyond fp32 and of float64 rows.
#pragma once
#include "exact.cuh"
#include "gradient.cuh"

namespace fusedkl {
namespace gpu {

struct RowPlan {
  RowGradient g;
  int fate;
  bool policy, reference;              // else the side's gradient is one number, and the row not read for it
  double fill_policy, fill_reference;  // 0, or NaN where the side is no distribution
  bool refine;
  double mean_p, mean_q;  // means of (x - y) - centre under p and q
};

// Logits, divergences or a temperature that fp32 arithmetic has no room for, or 16-bit rows too far apart for it.
FUSEDKL_DEVICE bool beyond_sweeps(const Inputs& in, const RowState& s, double inv_t) {
  auto large = [](double v, double limit) { return fabs(v) > limit && v != INFINITY; };
  return !(inv_t < 2e3 && inv_t > 5e-4) || large(s.policy_max, 1e37) || large(s.reference_max, 1e37) ||
         large(s.forward_kl, 1e30) || large(s.reverse_kl, 1e30) || s.policy_log_sum > 64 || s.reference_log_sum > 64 ||
         (in.dx != DType::f32 && in.dy != DType::f32 && difference_too_coarse(s, inv_t));
}

FUSEDKL_DEVICE double grad_at(const GradientArgs& a, int64_t field, int64_t r) {
  if (field < 0) return 0;
  const int64_t i = field * a.grad_stride[0] + r * a.grad_stride[1];
  return a.grad_f64 ? static_cast<const double*>(a.grad)[i] : static_cast<const float*>(a.grad)[i];
}

FUSEDKL_DEVICE double token_grad(const GradientArgs& a, int64_t field, int64_t k, int64_t r) {
  return field < 0 ? 0 : grad_at(a, field + k, r);
}

FUSEDKL_DEVICE RowPlan plan_of(const GradientArgs& a, int64_t r, const RowState& state) {
  RowPlan plan{};
  const RowState s = settled(state);
  const double inv_t = a.in.inv_t(r);
  RowGrads grads;
  bool token = false, ref_token = false;
  for (int64_t k = 0; k < a.ids_per_row; k++) {  // also of tokens that are not here: every logit moves their log-probability
    const double own = token_grad(a, a.at.logprob, k, r), other = token_grad(a, a.at.ref_logprob, k, r);
    const double ratio = token_grad(a, a.at.log_ratio, k, r);
    grads.logprob += own;
    grads.ref_logprob += other;
    grads.log_ratio += ratio;
    token |= own != 0 || ratio != 0;
    ref_token |= other != 0 || ratio != 0;
  }
  grads.forward_kl = grad_at(a, a.at.forward_kl, r);
  grads.reverse_kl = grad_at(a, a.at.reverse_kl, r);
  grads.entropy = grad_at(a, a.at.entropy, r);
  grads.logsumexp = grad_at(a, a.at.logsumexp, r);
  grads.mean_logprob = grad_at(a, a.at.mean_logprob, r);
  grads.ref_entropy = grad_at(a, a.at.ref_entropy, r);
  grads.ref_logsumexp = grad_at(a, a.at.ref_logsumexp, r);
  const double family = grad_at(a, a.at.family, r);
  // rows without an incoming gradient stay at 0 whatever they and their temperature hold
  if (token || ref_token || family != 0 || grads.any()) plan.g = row_gradient(s, inv_t, grads);
  if (family != 0) add_family_gradient(plan.g, a.kind.exact.kind, s, inv_t, family);
  const bool lost_policy = plan.g.policy_nan(), lost_reference = plan.g.reference_nan();
  plan.fill_policy = lost_policy ? NAN : 0;
  plan.fill_reference = lost_reference ? NAN : 0;
  plan.policy = a.gx.data && !lost_policy && (!plan.g.policy_zero() || token);
  plan.reference = a.gy.data && !lost_reference && (!plan.g.reference_zero() || ref_token);
  // an invalid side, of which the other needs nothing, must not reach that one's sums as 0 * NaN
  const bool half = s.policy_log_sum != s.policy_log_sum || s.reference_log_sum != s.reference_log_sum;
  const bool exact = a.in.exact() || half || beyond_sweeps(a.in, s, inv_t);
  plan.fate = exact || (plan.g.family() && has_double_gradient(a.kind.exact.kind, s)) ? kExact
              : plan.g.family()                                                       ? kFamily
                                                                                      : kSweep;
  // an infinite value has its coefficients at 0 already; here it must only not make 0 * inf
  const double t = 1 / inv_t, F = s.forward_kl == INFINITY ? 0 : s.forward_kl, R = s.reverse_kl == INFINITY ? 0 : s.reverse_kl;
  plan.mean_p = (s.residual + R) * t;
  plan.mean_q = (s.residual - F) * t;
  // where the differences lie close together far from 0, l - R and l + F must be right to their spread, and at the top of a
  // peaked row they are what the few others left; the mean over a slice would be another mean
  const bool close = F + R > 0.02;
  auto wants = [&](double log_sum) { return close || fabs(log_sum) < 0.01; };
  plan.refine = s.whole != 0 && plan.fate == kSweep &&
                ((plan.policy && plan.g.reverse != 0 && wants(s.policy_log_sum)) ||
                 (plan.reference && plan.g.ref_forward != 0 && wants(s.reference_log_sum)));
  return plan;
}

FUSEDKL_DEVICE GradientFrame::Weigh weigh_of(double max, double log_sum, double t, float slope) {
  const double exponent = max * t * slope;
  const float shift = static_cast<float>(exponent);
  return {shift, static_cast<float>(exp2(shift - exponent) * exp(-log_sum))};
}

FUSEDKL_DEVICE GradientFrame frame_of(const RowPlan& plan, const RowState& s, double inverse,
                                      const FamilyKind& kind = FamilyKind{}) {
  GradientFrame f{};
  const double t = 1 / inverse;
  f.fate = plan.fate;
  f.policy = plan.policy;
  f.reference = plan.reference;
  f.fill_policy = static_cast<float>(plan.fill_policy);
  f.fill_reference = static_cast<float>(plan.fill_reference);
  f.slope = static_cast<float>(kLog2e * inverse);
  f.inv_t = static_cast<float>(inverse);
  f.t = static_cast<float>(t);
  // of a number in two parts: where it is nearly the top token's own difference, one double has too few digits
  auto split = [](double base, double rest) {
    const float high = static_cast<float>(base + rest);
    return GradientFrame::TwoFloats{high, is_finite(base + rest) ? static_cast<float>((base - high) + rest) : 0.f};
  };
  auto log_of = [&](double max, double log_sum, float& about, float& rest) {
    about = static_cast<float>(max * t);
    rest = static_cast<float>(log_sum + (max - about * inverse));
  };
  f.p = weigh_of(s.policy_max, s.policy_log_sum, t, f.slope);
  f.q = weigh_of(s.reference_max, s.reference_log_sum, t, f.slope);
  f.ratio = split(s.centre, s.residual * t);
  f.above_p = split(s.centre, plan.mean_p);
  f.above_q = split(s.centre, plan.mean_q);
  log_of(s.policy_max, s.policy_log_sum, f.max_x, f.log_sum_x);
  log_of(s.reference_max, s.reference_log_sum, f.max_y, f.log_sum_y);
  f.entropy = static_cast<float>(s.entropy);
  f.ref_entropy = static_cast<float>(s.reference_entropy);
  f.forward = static_cast<float>(plan.g.forward);
  f.reverse = static_cast<float>(plan.g.reverse);
  f.mass = static_cast<float>(plan.g.mass);
  f.information = static_cast<float>(plan.g.information);
  f.uniform = static_cast<float>(plan.g.uniform);
  f.ref_forward = static_cast<float>(plan.g.ref_forward);
  f.ref_reverse = static_cast<float>(plan.g.ref_reverse);
  f.ref_mass = static_cast<float>(plan.g.ref_mass);
  f.ref_information = static_cast<float>(plan.g.ref_information);
  f.divergence = static_cast<float>(plan.g.divergence);
  f.ref_divergence = static_cast<float>(plan.g.ref_divergence);
  f.policy_mean = static_cast<float>(s.policy_slope);
  f.reference_mean = static_cast<float>(s.reference_slope);
  if (plan.g.family()) f.divergence_value = static_cast<float>(gradient_value(kind, s));
  return f;
}

// Means of x - y under p and q, measured once more about what the state has.
FUSEDKL_DEVICE void refine_means(const GradientArgs& a, int64_t r, RowPlan& plan, const GradientFrame& f, double* room) {
  const char *const x = a.in.x.row(r), *const y = a.in.y.row(r);
  const double centre = a.state[r].centre;
  float weight_p = 0, weight_q = 0, moment_p = 0, moment_q = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x); i < a.in.length; i += static_cast<int64_t>(blockDim.x)) {
    const double u = load_any(x, a.in.dx, i), v = load_any(y, a.in.dy, i);
    if (u == -INFINITY || v == -INFINITY) continue;
    // with the weights, or a heavy token far above the sampled one would leave the range
    const float p = exp2_fast(fmaf(static_cast<float>(u), f.slope, -f.p.shift)) * f.p.weight;
    const float q = exp2_fast(fmaf(static_cast<float>(v), f.slope, -f.q.shift)) * f.q.weight;
    weight_p += p;
    weight_q += q;
    moment_p = fmaf(p, static_cast<float>(((u - v) - centre) - plan.mean_p), moment_p);
    moment_q = fmaf(q, static_cast<float>(((u - v) - centre) - plan.mean_q), moment_q);
  }
  const double p = block_sum(weight_p, room), q = block_sum(weight_q, room);
  const double shift_p = block_sum(moment_p, room), shift_q = block_sum(moment_q, room);
  if (p > 0) plan.mean_p += shift_p / p;
  if (q > 0) plan.mean_q += shift_q / q;
}

// One token's gradients in double, before a cap's slope.
FUSEDKL_DEVICE SideGradients gradients_at(const GradientArgs& a, const RowPlan& plan, const RowState& s, double x, double y,
                                          double inv_t) {
  if (x == -INFINITY && y == -INFINITY) return {0, 0};
  const RowGradient& g = plan.g;
  SideGradients out{0, 0};
  if (plan.policy) out.policy = policy_gradient_at(s, g, x, y, inv_t);
  if (plan.reference) out.reference = reference_gradient_at(s, g, x, y, inv_t);
  if (!g.family()) return out;
  const FamilyGradient<ScalarOps> own = family_gradient_at(a.kind.exact, s, x, y, inv_t);
  if (g.divergence != 0) out.policy += g.divergence * own.policy;
  if (g.ref_divergence != 0) out.reference += g.ref_divergence * own.reference;
  return out;
}

// Whether the token's gradient is stored: it is here, and no earlier one of the row is the same.
FUSEDKL_DEVICE bool is_stored(const GradientArgs& a, int64_t r, int64_t which) {
  const int64_t* const ids = a.ids + r * a.ids_per_row;
  bool stored = ids[which] >= 0 && ids[which] < a.in.length;
  for (int64_t j = 0; j < which; j++) stored &= ids[j] != ids[which];
  return stored;
}

// The whole gradients of the tokens that were asked for; NaN where none is stored.
FUSEDKL_DEVICE void token_gradients(const GradientArgs& a, const RowPlan& plan, int64_t r) {
  const int64_t* const ids = a.ids + r * a.ids_per_row;
  const double inv_t = a.in.inv_t(r);
  for (int64_t k = static_cast<int64_t>(threadIdx.x); k < a.ids_per_row; k += static_cast<int64_t>(blockDim.x)) {
    double to_policy = NAN, to_reference = NAN;
    if (is_stored(a, r, k)) {
      double own = 0, other = 0;
      for (int64_t j = k; j < a.ids_per_row; j++) {
        if (ids[j] != ids[k]) continue;
        const double ratio = token_grad(a, a.at.log_ratio, j, r);
        own += token_grad(a, a.at.logprob, j, r) + ratio;
        other += token_grad(a, a.at.ref_logprob, j, r) - ratio;
      }
      const ExactRows rows = exact_rows(a.in, r);
      const SideGradients rest = gradients_at(a, plan, settled(a.state[r]), rows.policy(ids[k]), rows.reference(ids[k]), inv_t);
      to_policy = (rest.policy + own * inv_t) * rows.policy_slope(ids[k]);
      to_reference = (rest.reference + other * inv_t) * rows.reference_slope(ids[k]);
    }
    if (a.tokens) a.tokens[r * a.ids_per_row + k] = to_policy;
    if (a.ref_tokens) a.ref_tokens[r * a.ids_per_row + k] = to_reference;
  }
}

FUSEDKL_DEVICE void exact_gradient(const GradientArgs& a, const RowPlan& plan, int64_t r) {
  char* const gx = a.gx.data ? a.gx.row(r) : nullptr;
  char* const gy = a.gy.data ? a.gy.row(r) : nullptr;
  const double inv_t = a.in.inv_t(r);
  const RowState s = settled(a.state[r]);
  const ExactRows rows = exact_rows(a.in, r);
  const bool writes_x = gx && plan.policy, writes_y = gy && plan.reference;
  for (int64_t i = static_cast<int64_t>(threadIdx.x); i < a.in.length && (writes_x || writes_y);
       i += static_cast<int64_t>(blockDim.x)) {
    const SideGradients v = gradients_at(a, plan, s, rows.policy(i), rows.reference(i), inv_t);
    const double slope_x = rows.policy_slope(i);  // before the logit may be overwritten
    if (writes_y) store_any(gy, a.in.dy, i, v.reference * rows.reference_slope(i));
    if (writes_x) store_any(gx, a.in.dx, i, v.policy * slope_x);
  }
  if (gx && !writes_x) fill(gx, a.in.dx, 0, a.in.length, static_cast<float>(plan.fill_policy));
  if (gy && !writes_y) fill(gy, a.in.dy, 0, a.in.length, static_cast<float>(plan.fill_reference));
  if (gx) fill(gx, a.in.dx, a.in.length, a.total_x, 0);
  if (gy) fill(gy, a.in.dy, a.in.length, a.total_y, 0);
  __syncthreads();
  if (plan.policy) store_tokens(a, r, a.tokens, gx, a.in.dx, 0, a.in.length);
  if (plan.reference) store_tokens(a, r, a.ref_tokens, gy, a.in.dy, 0, a.in.length);
}

}  // namespace gpu
}  // namespace fusedkl
