// Plain data between the operators and the instruction-set specific kernels.
#pragma once
#include "../family_math.h"
#include "dtype.h"

namespace fusedkl {

// A row of logits as the double path reads it.
struct Logits {
  const void* data;
  DType dtype;
  double cap = 0;  // logits are cap tanh(x / cap), unless 0

  double operator[](int64_t i) const { return softcapped(load_double(data, dtype, i), cap); }
  double slope(int64_t i) const { return cap == 0 ? 1 : softcap_slope(load_double(data, dtype, i), cap); }
};

// One row of a gradient sweep; x and y have one dtype, gradients too. gx may be x.
struct GradientJob {
  const void* x = nullptr;
  const void* y = nullptr;  // null: no reference
  void* gx = nullptr;
  void* gy = nullptr;
  int64_t n = 0;
  double inv_t = 1;
  double cap = 0;
  RowState state;
  RowGradient gradient;
  FamilyKind kind;  // of gradient.divergence, or of the sums
};

// Two polynomials in l = log(p/q), per unit of q: the terms of the sums (value, policy slope) or both gradients. They serve up to
// |l| = series_reach, the close ones up to a quarter of that.
constexpr int kSeriesTerms = 10, kCloseTerms = 7;       // relative error 1e-7, of skew_kl at alpha 0.9 up to 1e-6
constexpr int kCoarseTerms = 7, kCoarseCloseTerms = 5;  // of gradients in 16 bits: 5e-5
struct FamilySeries {
  float first[kSeriesTerms], second[kSeriesTerms];
  float close_first[kCloseTerms], close_second[kCloseTerms];
};
FamilySeries family_sums_series(const FamilyKind& kind);
FamilySeries family_gradient_series(const GradientJob& job, bool coarse);

// Of rows under a softcap c, which are taken about their maxima (`max` on return, as it is under the cap). All that return a bool
// say whether float could do it.
struct SoftcapKernels {
  bool (*pair)(float* x, float* y, int64_t n, double c, double& max);  // in place: the two rows become DType::apart
  bool (*row)(float* x, int64_t n, double c, double& max);             // in place
  bool (*divergence)(const void* d, const void* y, int64_t n, double inv_t, bool reverse, bool& entropies, RowState& out);
  void (*gradient)(GradientJob);
  FamilySums (*family_sums)(const GradientJob&);
  void (*family_gradient)(GradientJob);
  // to = gradient times the slope at the logits, which it may replace
  void (*store[3])(const float* gradient, const void* logits, void* to, int64_t n, double c);
};

// The kernels of one instruction set; arrays are indexed by DType (f32, bf16, f16).
struct KernelTable {
  const char* isa;
  // entropies: whether both are wanted too; on return, whether they were made. coarse, on return: 16-bit logits whose divergence
  // wants the sweep over fp32
  RowState (*divergence[3])(const void* x, const void* y, int64_t n, double inv_t, bool reverse, bool& entropies, bool& coarse);
  RowState (*single[3])(const void* x, int64_t n, double inv_t, bool entropy);
  bool (*sharpen_mass)(const float* logits, int64_t n, double inv_t, double& max, double& log_mass);
  double (*logit_sum[3])(const void* x, int64_t n);
  void (*gradient[3])(GradientJob);
  bool (*needs_whole_row[3])(const GradientJob&);
  void (*sharpen[3])(GradientJob, RowState&);
  FamilySums (*family_sums[3])(const GradientJob&);
  void (*family_gradient[3])(GradientJob);
  void (*widen[3])(const void* from, float* to, int64_t n);
  void (*narrow[3])(const float* from, void* to, int64_t n);
  void (*log_softmax)(float* logits, int64_t n, const RowState& state);                        // in place
  double (*sum)(const float* values, int64_t n);                                               // fixed order
  void (*log_softmax_gradient)(const float* output, float* grad, int64_t n, double grad_sum);  // in place in grad
  SoftcapKernels softcap;
};

// The table of the best instruction set this machine and FUSEDKL_CPU_ISA allow; chosen once.
// Null where FUSEDKL_CPU_ISA names one that this machine or build lacks: an explicit choice never falls back.
const KernelTable* kernels_or_null();

extern const KernelTable kPortableKernels;
const KernelTable* avx2_kernels();  // null where not compiled or not supported by the machine
const KernelTable* avx512_kernels();
const KernelTable* avx512_bf16_kernels();

// Where 1/T alone takes fp32 arithmetic out of its range; such rows take the double path.
static inline bool extreme_temperature(double inv_t) { return !(inv_t < 1e6 && inv_t > 1e-6); }

// Logits, divergences or a temperature that fp32 arithmetic has no room for: masks at finfo.min, T below 1e-6.
static inline bool beyond_float(const RowState& s, double inv_t) {
  auto large = [](double v, double limit) { return fabs(v) > limit && v != INFINITY; };
  return extreme_temperature(inv_t) || large(s.policy_max, 1e37) || large(s.reference_max, 1e37) || large(s.forward_kl, 1e30) ||
         large(s.reverse_kl, 1e30);
}

// Values without what a gradient cannot use: an infinite one has its coefficients at 0 already, and must only not make 0 * inf.
struct FiniteKls {
  double F, R;
  FUSEDKL_MEMBER explicit FiniteKls(const RowState& s)
      : F(s.forward_kl == INFINITY ? 0 : s.forward_kl), R(s.reverse_kl == INFINITY ? 0 : s.reverse_kl) {}
};

// What the state of a row that can be read whole is short of.
struct Lacking {
  bool means;  // l - R and l + F must be right to the spread of the differences under p and q, where the KLs are large
  bool ratio;  // l itself must, where they are tiny and the centre of the forward sweep was off

  FUSEDKL_MEMBER bool any() const { return means || ratio; }
};

// A mass beside the top token that is so small against the divergence is known better than the divergence, as is then the
// log-ratio that it is in.
static inline double few_others(double forward_kl) { return 4 * forward_kl; }

// In a peaked row l of the top token is a tiny rest of larger numbers; more so in a row of which the slice is a part. Gradients in
// 16 bits round more than that, unless the rows are so far apart that they are taken in fp32. `peaked` looks at the row.
template <class Peaked>
static inline Lacking lacking_where(const GradientJob& job, bool slice, bool in_fp32, const Peaked& peaked) {
  const RowState& s = job.state;
  const FiniteKls kl(s);
  const bool means =
      (job.gradient.reverse != 0 || job.gradient.ref_forward != 0) && (kl.F + kl.R > 0.02 || (in_fp32 && peaked()));
  // A token with nearly all of both masses, which the sample has, and others so far apart that they make the divergence.
  const bool one_token = in_fp32 && !slice && fmax(s.policy_log_sum, s.reference_log_sum) < few_others(kl.F) + 1e-6;
  const bool off = slice || fabs(s.residual) > 10 * kl.F;
  const bool ratio = kl.F > 0 && kl.F < 1e-3 && (one_token || (off && in_fp32 && peaked()));
  return {means, ratio};
}

// fp64 rows, in double throughout
RowState divergence_f64(const Logits& x, const Logits& y, int64_t n, double inv_t);
RowState single_f64(const Logits& x, int64_t n, double inv_t);
FamilySums family_sums_f64(const GradientJob& job, DType dx, DType dy);
void add_log_sum_f64(const GradientJob& job, DType dx, DType dy, LogSum& sum);  // of q^a p^(1-a)
void gradient_f64(const GradientJob& job, DType dx, DType dy);
// One token's gradients, in double; y is -inf where there is no reference. Of the sides that have a gradient, before the cap.
struct SideGradients {
  double policy, reference;
};
SideGradients gradients_at(const GradientJob& job, double x, double y);
double logit_sum(const Logits& x, int64_t n);  // of any dtype, in index order

}  // namespace fusedkl
