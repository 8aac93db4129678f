// fp64 rows (either input fp64): the two-sweep form in double with the library's exponentials. For gradcheck and for references,
// not for speed.
#include "../family_terms.h"
#include "job.h"

namespace fusedkl {
namespace {

struct Mass {
  double max = -INFINITY;
  EntropySums about;  // about the largest logit
  bool invalid = false;
};

Mass mass_of(const Logits& x, int64_t n, double inv_t) {
  Mass m;
  for (int64_t i = 0; i < n; i++) {
    const double v = x[i];
    if (!(v < INFINITY)) m.invalid = true;  // NaN or +inf
    if (v > m.max) m.max = v;
  }
  for (int64_t i = 0; i < n && !m.invalid && m.max > -INFINITY; i++) m.about.add((m.max - x[i]) * inv_t);
  return m;
}

}  // namespace

RowState single_f64(const Logits& x, int64_t n, double inv_t) {
  const Mass m = mass_of(x, n, inv_t);
  return m.invalid ? nan_state() : exact_masses(m.max, m.about, m.max, m.about, inv_t);
}

RowState divergence_f64(const Logits& x, const Logits& y, int64_t n, double inv_t) {
  const Mass mx = mass_of(x, n, inv_t), my = mass_of(y, n, inv_t);
  if (mx.invalid || my.invalid) return nan_state();
  RowState s = exact_masses(mx.max, mx.about, my.max, my.about, inv_t);
  if (mx.max == -INFINITY || my.max == -INFINITY) return s;
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
  ExactSums all;
  for (int64_t i = 0; i < n; i++) {
    const double x_i = x[i], y_i = y[i];
    all.add(x_i, y_i, exp((y_i - my.max) * inv_t) * scale, exp((x_i - mx.max) * inv_t) * kappa, centre, inv_t);
  }
  s.centre = centre;
  s.residual = all.sums.log_ratio_about_centre();
  s.forward_kl = all.policy_lacks ? INFINITY : all.sums.forward_kl();
  s.reverse_kl = all.reference_lacks ? INFINITY : all.sums.reverse_kl();
  return s;
}

FamilySums family_sums_f64(const GradientJob& job, DType dx, DType dy) {
  const FamilyConstants<ScalarOps> c(job.kind);
  const Logits x{job.x, dx, job.cap}, y{job.y, dy, job.cap};
  FamilySums out;
  for (int64_t i = 0; i < job.n; i++) out.add(family_sums_at(c, job.state, x[i], y[i], job.inv_t));
  return out;
}

void add_log_sum_f64(const GradientJob& job, DType dx, DType dy, LogSum& sum) {
  const FamilyConstants<ScalarOps> c(job.kind);
  const Logits x{job.x, dx, job.cap}, y{job.y, dy, job.cap};
  for (int64_t i = 0; i < job.n; i++) sum.add(tilted_log2_at(c, job.state, x[i], y[i], job.inv_t));
}

static SideGradients gradients_of(const GradientJob& job, const FamilyConstants<ScalarOps>& c, double x, double y) {
  const RowGradient& g = job.gradient;
  if (x == -INFINITY && y == -INFINITY) return {0, 0};
  const auto own = g.family() ? family_gradient_at(c, job.state, x, y, job.inv_t) : FamilyGradient<ScalarOps>{0, 0};
  auto with = [](double v, double coefficient, double term) { return coefficient != 0 ? v + coefficient * term : v; };
  return {job.gx ? with(policy_gradient_at(job.state, g, x, y, job.inv_t), g.divergence, own.policy) : 0,
          job.gy ? with(reference_gradient_at(job.state, g, x, y, job.inv_t), g.ref_divergence, own.reference) : 0};
}

SideGradients gradients_at(const GradientJob& job, double x, double y) {
  return gradients_of(job, FamilyConstants<ScalarOps>(job.kind), x, y);
}

void gradient_f64(const GradientJob& job, DType dx, DType dy) {
  const FamilyConstants<ScalarOps> c(job.kind);
  const Logits xs{job.x, dx, job.cap}, ys{job.y, dy, job.cap};
  for (int64_t i = 0; i < job.n; i++) {
    const SideGradients found = gradients_of(job, c, xs[i], job.y ? ys[i] : -INFINITY);
    const double slope = xs.slope(i);  // before the logit may be overwritten
    if (job.gy) store_double(job.gy, dy, i, found.reference * ys.slope(i));
    if (job.gx) store_double(job.gx, dx, i, found.policy * slope);
  }
}

double logit_sum(const Logits& x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i];
  return sum;
}

}  // namespace fusedkl
