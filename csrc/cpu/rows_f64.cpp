// fp64 rows (either input fp64): the two-sweep form in double with the library's exponentials. For gradcheck and for references,
// not for speed.
#include "../family_terms.h"
#include "job.h"

namespace fusedkl {
namespace {

struct Mass {
  double max = -INFINITY, rest = 0, gap = 0;  // sum and first moment of e^(v - max) without one entry equal to max
  bool invalid = false;
};

Mass mass_of(const Logits& x, int64_t n, double inv_t) {
  Mass m;
  int64_t top = -1;
  for (int64_t i = 0; i < n; i++) {
    const double v = x[i];
    if (!(v < INFINITY)) m.invalid = true;  // NaN or +inf
    if (v > m.max) m.max = v, top = i;
  }
  for (int64_t i = 0; i < n && !m.invalid; i++) {
    const double v = x[i];
    if (i == top || v == -INFINITY) continue;
    const double w = exp((v - m.max) * inv_t);
    m.rest += w;
    m.gap += w * (m.max - v) * inv_t;
  }
  return m;
}

}  // namespace

RowState single_f64(const Logits& x, int64_t n, double inv_t) {
  const Mass m = mass_of(x, n, inv_t);
  if (m.invalid) return nan_state();
  RowState s{};
  if (m.max == -INFINITY) {
    s.policy_log_sum = -INFINITY;
    return s;
  }
  s.policy_max = m.max * inv_t;
  s.policy_log_sum = log_mass(1, m.rest);
  s.entropy = entropy_of(1, m.rest, m.gap);
  return s;
}

RowState divergence_f64(const Logits& x, const Logits& y, int64_t n, double inv_t) {
  const Mass mx = mass_of(x, n, inv_t), my = mass_of(y, n, inv_t);
  if (mx.invalid || my.invalid) return nan_state();
  RowState s{};
  const bool has_x = mx.max > -INFINITY, has_y = my.max > -INFINITY;
  s.policy_max = has_x ? mx.max * inv_t : 0;
  s.reference_max = has_y ? my.max * inv_t : 0;
  s.policy_log_sum = has_x ? log_mass(1, mx.rest) : -INFINITY;
  s.reference_log_sum = has_y ? log_mass(1, my.rest) : -INFINITY;
  if (!has_x || !has_y) {
    s.residual = has_x ? INFINITY : has_y ? -INFINITY : 0;
    return s;
  }
  // centre: the reference-weighted mean of the difference about its first value, exact where the difference is constant
  const double direct = (mx.max - my.max) * inv_t + (s.policy_log_sum - s.reference_log_sum), scale = exp(-s.reference_log_sum);
  double origin = NAN, mean = 0;
  for (int64_t i = 0; i < n; i++) {
    const double d = x[i] - y[i];
    if (!is_finite(d)) continue;
    if (origin != origin) origin = d;
    mean += exp((y[i] - my.max) * inv_t) * scale * (d - origin);
  }
  double centre = origin + mean;
  if (!(fabs(centre * inv_t - direct) < 0.5)) centre = direct / inv_t;
  const double kappa = exp(direct - centre * inv_t - s.policy_log_sum);
  CentredSums sums;
  bool policy_lacks = false, reference_lacks = false;
  for (int64_t i = 0; i < n; i++) {
    const double x_i = x[i], y_i = y[i];
    if (x_i == -INFINITY && y_i == -INFINITY) continue;
    const double q = exp((y_i - my.max) * inv_t) * scale;
    const double e = exp((x_i - mx.max) * inv_t) * kappa;  // q e^u
    sums.S += q;
    if (x_i == -INFINITY || y_i == -INFINITY) {
      (x_i == -INFINITY ? policy_lacks : reference_lacks) = true;
      sums.B += e - q;
      sums.M += e - q;
      sums.C += q;
      continue;
    }
    const double u = ((x_i - y_i) - centre) * inv_t;
    sums.A += q * u;
    sums.B += fabs(u) < 30 ? q * g_of(u) : e - q - q * u;
    sums.C += fabs(u) < 30 ? q * k_of(u) : q + e * (u - 1);
    sums.M += fabs(u) < 30 ? q * expm1(u) : e - q;
  }
  s.centre = centre;
  s.residual = sums.log_ratio_about_centre();
  s.forward_kl = policy_lacks ? INFINITY : sums.forward_kl();
  s.reverse_kl = reference_lacks ? INFINITY : sums.reverse_kl();
  return s;
}

FamilySums family_sums_f64(const GradientJob& job, DType dx, DType dy) {
  const FamilyConstants<ScalarOps> c(job.kind);
  const Logits x{job.x, dx, job.cap}, y{job.y, dy, job.cap};
  FamilySums out;
  for (int64_t i = 0; i < job.n; i++) {
    const FamilyToken<ScalarOps> t = family_token(job.state, x[i], y[i], job.inv_t);
    const auto terms = family_switch(c.kind, [&](auto f) { return family_terms<decltype(f)::value, ScalarOps>(c, t); });
    const double apart = t.big * t.d;
    out.add({terms.value, terms.policy, terms.reference, apart, t.policy_big ? apart : -apart});
  }
  return out;
}

void gradient_f64(const GradientJob& job, DType dx, DType dy) {
  const FamilyConstants<ScalarOps> c(job.kind);
  const RowGradient& g = job.gradient;
  const Logits xs{job.x, dx, job.cap}, ys{job.y, dy, job.cap};
  for (int64_t i = 0; i < job.n; i++) {
    const double x = xs[i], y = job.y ? ys[i] : -INFINITY, slope = xs.slope(i);
    const bool absent = x == -INFINITY && y == -INFINITY;
    const auto own = g.family() ? family_gradient_at(c, job.state, x, y, job.inv_t) : FamilyGradient<ScalarOps>{0, 0};
    auto with = [](double v, double coefficient, double term) { return coefficient != 0 ? v + coefficient * term : v; };
    if (job.gy) {
      const double v = absent ? 0 : reference_gradient_at(job.state, g, x, y, job.inv_t);
      store_double(job.gy, dy, i, with(v, g.ref_divergence, own.reference) * ys.slope(i));
    }
    if (job.gx) {
      const double v = absent ? 0 : policy_gradient_at(job.state, g, x, y, job.inv_t);
      store_double(job.gx, dx, i, with(v, g.divergence, own.policy) * slope);
    }
  }
}

double logit_sum(const Logits& x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i];
  return sum;
}

}  // namespace fusedkl
