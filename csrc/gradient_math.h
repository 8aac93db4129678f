// The gradients of a row's numbers: what a backward sweep computes per token, given the RowState of row_math.h.
#pragma once
#include "row_math.h"

namespace fusedkl {

// The gradients that arrive for a row's values; those of tokens summed over the tokens.
struct RowGrads {
  double forward_kl = 0, reverse_kl = 0, entropy = 0, logsumexp = 0, mean_logprob = 0, logprob = 0, log_ratio = 0;
  double ref_entropy = 0, ref_logsumexp = 0, ref_logprob = 0;

  FUSEDKL_MEMBER bool any() const {
    return forward_kl != 0 || reverse_kl != 0 || entropy != 0 || logsumexp != 0 || mean_logprob != 0 || logprob != 0 ||
           log_ratio != 0 || ref_entropy != 0 || ref_logsumexp != 0 || ref_logprob != 0;
  }
};

// One row's gradient, as coefficients of what a sweep can compute per token (l = log p - log q):
//   d/dx = q * (forward * expm1(l)) + p * (reverse * (l - R) + mass + information * (log p + H(p))) + uniform   (+ token scatter)
//   d/dy = q * (ref_forward * (l + F) + ref_reverse * expm1(l) + ref_mass + ref_information * (log q + H(q)))   (+ token scatter)
// Everything already carries the incoming gradient and 1/T.
struct RowGradient {
  double forward = 0, reverse = 0, mass = 0, information = 0, uniform = 0;
  double ref_forward = 0, ref_reverse = 0, ref_mass = 0, ref_information = 0;
  double divergence = 0, ref_divergence = 0;  // of a divergence of family_math.h

  FUSEDKL_MEMBER bool policy_zero() const {
    return forward == 0 && reverse == 0 && mass == 0 && information == 0 && uniform == 0 && divergence == 0;
  }
  FUSEDKL_MEMBER bool reference_zero() const {
    return ref_forward == 0 && ref_reverse == 0 && ref_mass == 0 && ref_information == 0 && ref_divergence == 0;
  }
  // whether a side's gradient looks at the other row
  FUSEDKL_MEMBER bool family() const { return divergence != 0 || ref_divergence != 0; }
  FUSEDKL_MEMBER bool paired() const { return forward != 0 || reverse != 0 || ref_forward != 0 || ref_reverse != 0 || family(); }
  FUSEDKL_MEMBER bool policy_nan() const { return is_nan(forward + reverse + mass + information + uniform + divergence); }
  FUSEDKL_MEMBER bool reference_nan() const {
    return is_nan(ref_forward + ref_reverse + ref_mass + ref_information + ref_divergence);
  }

 private:
  FUSEDKL_MEMBER static bool is_nan(double v) { return v != v; }
};

// grads of the row's values -> coefficients. Where a KL is +inf its policy gradient is p - q and its reference gradient 0. A side
// that is no distribution makes NaN of every coefficient that stands on it and has a gradient.
FUSEDKL_HD static inline RowGradient row_gradient(const RowState& s, double inv_t, const RowGrads& g) {
  RowGradient r;
  const bool f_inf = s.forward_kl == INFINITY, r_inf = s.reverse_kl == INFINITY;
  auto on = [](double value, double column) { return value != 0 && column != column ? NAN : value; };
  const double forward = on(g.forward_kl, s.forward_kl), reverse = on(g.reverse_kl, s.reverse_kl);
  r.forward = inv_t * (forward + (r_inf ? reverse : 0));
  r.reverse = r_inf ? 0 : inv_t * reverse;
  r.ref_forward = f_inf ? 0 : -inv_t * forward;
  r.ref_reverse = r_inf ? 0 : -inv_t * reverse;
  r.mass = inv_t * on((g.logsumexp - g.logprob) - (g.mean_logprob + on(g.log_ratio, s.residual)), s.policy_log_sum);
  r.information = -inv_t * on(g.entropy, s.policy_log_sum);
  r.uniform = g.mean_logprob != 0 ? inv_t * on(g.mean_logprob, s.policy_log_sum) / s.tokens : 0;
  r.ref_mass = inv_t * on((g.ref_logsumexp - g.ref_logprob) + on(g.log_ratio, s.residual), s.reference_log_sum);
  r.ref_information = -inv_t * on(g.ref_entropy, s.reference_log_sum);
  return r;
}

// The state with the sides exchanged, as far as one side alone is concerned.
FUSEDKL_HD static inline RowState reference_alone(const RowState& s) {
  RowState r{};
  r.policy_max = s.reference_max;
  r.policy_log_sum = s.reference_log_sum;
  r.entropy = s.reference_entropy;
  return r;
}
FUSEDKL_HD static inline RowGradient reference_alone(const RowGradient& g) {
  RowGradient r;
  r.mass = g.ref_mass;
  r.information = g.ref_information;
  return r;
}

// What one logit gets from its own row: p (mass + information (log p + H)) + uniform; nothing where it is -inf.
FUSEDKL_HD static inline double own_gradient_at(const RowState& s, const RowGradient& r, double x, double inv_t) {
  if (x == -INFINITY) return 0;
  const double log_p = (x * inv_t - s.policy_max) - s.policy_log_sum, p = exp(log_p);
  return (p != 0 ? p * (r.mass + (r.information != 0 ? r.information * (log_p + s.entropy) : 0)) : 0) + r.uniform;
}

// The same gradients for one token, in double: the tokens whose log-probability was asked for are stored once, from here.
FUSEDKL_HD static inline double policy_gradient_at(const RowState& s, const RowGradient& r, double x, double y, double inv_t) {
  double v = own_gradient_at(s, r, x, inv_t);
  if (r.forward != 0 || r.reverse != 0) {
    const double p = exp((x * inv_t - s.policy_max) - s.policy_log_sum);
    const double q = exp((y * inv_t - s.reference_max) - s.reference_log_sum), l = ((x - y) - s.centre) * inv_t - s.residual;
    v += r.forward * (q > 0 && l < 1 ? q * expm1(l) : p - q);
    if (r.reverse != 0 && p != 0) v += p * r.reverse * (l - s.reverse_kl);
  }
  return v;
}
FUSEDKL_HD static inline double reference_gradient_at(const RowState& s, const RowGradient& r, double x, double y, double inv_t) {
  double v = own_gradient_at(reference_alone(s), reference_alone(r), y, inv_t);
  if (r.ref_forward != 0 || r.ref_reverse != 0) {
    const double q = exp((y * inv_t - s.reference_max) - s.reference_log_sum), l = ((x - y) - s.centre) * inv_t - s.residual;
    if (r.ref_forward != 0 && q != 0) v += r.ref_forward * q * (l + s.forward_kl);
    if (r.ref_reverse != 0)
      v += r.ref_reverse * (q > 0 && l < 1 ? q * expm1(l) : exp((x * inv_t - s.policy_max) - s.policy_log_sum) - q);
  }
  return v;
}

}  // namespace fusedkl
