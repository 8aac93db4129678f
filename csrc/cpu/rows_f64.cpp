// fp64 rows (either input fp64): the two-sweep form in double with the library's exponentials. For gradcheck and for references,
// not for speed.
#include "job.h"

namespace fusedkl {
namespace {

struct Mass {
  double max = -INFINITY;
  EntropySums about;  // about the largest logit
  bool invalid = false;
};

Mass mass_of(const void* x, DType d, int64_t n, double inv_t) {
  Mass m;
  for (int64_t i = 0; i < n; i++) {
    const double v = load_double(x, d, i);
    if (!(v < INFINITY)) m.invalid = true;  // NaN or +inf
    if (v > m.max) m.max = v;
  }
  for (int64_t i = 0; i < n && !m.invalid && m.max > -INFINITY; i++) m.about.add((m.max - load_double(x, d, i)) * inv_t);
  return m;
}

}  // namespace

RowState single_f64(const void* x, DType dx, int64_t n, double inv_t) {
  const Mass m = mass_of(x, dx, n, inv_t);
  return m.invalid ? nan_state() : exact_masses(m.max, m.about, m.max, m.about, inv_t);
}

RowState divergence_f64(const void* x, DType dx, const void* y, DType dy, int64_t n, double inv_t) {
  const Mass mx = mass_of(x, dx, n, inv_t), my = mass_of(y, dy, n, inv_t);
  if (mx.invalid || my.invalid) return nan_state();
  RowState s = exact_masses(mx.max, mx.about, my.max, my.about, inv_t);
  if (mx.max == -INFINITY || my.max == -INFINITY) return s;
  // centre: the reference-weighted mean of the difference about its first value, exact where the difference is constant
  const double direct = (mx.max - my.max) * inv_t + (s.policy_log_sum - s.reference_log_sum), scale = exp(-s.reference_log_sum);
  double origin = NAN, mean = 0;
  for (int64_t i = 0; i < n; i++) {
    const double d = load_double(x, dx, i) - load_double(y, dy, i);
    if (!is_finite(d)) continue;
    if (origin != origin) origin = d;
    mean += exp((load_double(y, dy, i) - my.max) * inv_t) * scale * (d - origin);
  }
  double centre = origin + mean;
  if (!(fabs(centre * inv_t - direct) < 0.5)) centre = direct / inv_t;
  const double kappa = exp(direct - centre * inv_t - s.policy_log_sum);
  ExactSums all;
  for (int64_t i = 0; i < n; i++) {
    const double x_i = load_double(x, dx, i), y_i = load_double(y, dy, i);
    all.add(x_i, y_i, exp((y_i - my.max) * inv_t) * scale, exp((x_i - mx.max) * inv_t) * kappa, centre, inv_t);
  }
  s.centre = centre;
  s.residual = all.sums.log_ratio_about_centre();
  s.forward_kl = all.policy_lacks ? INFINITY : all.sums.forward_kl();
  s.reverse_kl = all.reference_lacks ? INFINITY : all.sums.reverse_kl();
  return s;
}

void gradient_f64(const GradientJob& job, DType dx, DType dy) {
  const RowState& s = job.state;
  const RowGradient& g = job.gradient;
  for (int64_t i = 0; i < job.n; i++) {
    const double x = load_double(job.x, dx, i), y = job.y ? load_double(job.y, dy, i) : 0;
    const bool absent = x == -INFINITY && (!job.y || y == -INFINITY);
    if (job.gy) store_double(job.gy, dy, i, absent ? 0 : reference_gradient_at(s, g, x, y, job.inv_t));
    if (job.gx) store_double(job.gx, dx, i, absent ? 0 : policy_gradient_at(s, g, x, y, job.inv_t, job.y != nullptr));
  }
}

}  // namespace fusedkl
