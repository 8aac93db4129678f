// Plain data between the operators and the instruction-set specific kernels.
#pragma once
#include "../row_math.h"
#include "dtype.h"

namespace fusedkl {

// One row of a gradient sweep; x and y have one dtype, gradients too. gx may be x.
struct GradientJob {
  const void* x = nullptr;
  const void* y = nullptr;  // null: no reference
  void* gx = nullptr;
  void* gy = nullptr;
  int64_t n = 0;
  double inv_t = 1;
  RowState state;
  RowGradient gradient;
};

// The kernels of one instruction set; arrays are indexed by DType (f32, bf16, f16).
struct KernelTable {
  const char* isa;
  RowState (*divergence[3])(const void* x, const void* y, int64_t n, double inv_t, bool reverse);
  RowState (*single[3])(const void* x, int64_t n, double inv_t, bool entropy);
  void (*gradient[3])(GradientJob);
  void (*sharpen[3])(GradientJob, RowState&);
  void (*widen[3])(const void* from, float* to, int64_t n);
  void (*narrow[3])(const float* from, void* to, int64_t n);
  void (*log_softmax)(float* logits, int64_t n, const RowState& state);                        // in place
  double (*sum)(const float* values, int64_t n);                                               // fixed order
  void (*log_softmax_gradient)(const float* output, float* grad, int64_t n, double grad_sum);  // in place in grad
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

// fp64 rows, in double throughout
RowState divergence_f64(const void* x, DType dx, const void* y, DType dy, int64_t n, double inv_t);
RowState single_f64(const void* x, DType dx, int64_t n, double inv_t);
void gradient_f64(const GradientJob& job, DType dx, DType dy);

}  // namespace fusedkl
