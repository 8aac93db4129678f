// torch.nn.functional.kl_div on contiguous CPU tensors of one shape and dtype: the reduced value and the gradients, each in
// one sweep over memory. Everything else torch's function accepts is left to torch (fusedkl/kl_div.py).
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tensors.h"

// Vector types of gcc and clang are what the kernels are written in; other compilers leave the operators without a CPU kernel.
#if defined(__GNUC__)

namespace {

// Indices: DType (f32, bf16, f16, f64), log_target, and for gradients which: input, target, both.
struct KlKernels {
  double (*sum[4][2])(const void* input, const void* target, int64_t n);
  void (*gradient[4][2][3])(double grad, const void* input, const void* target, void* input_grad, void* target_grad, int64_t n);
};

}  // namespace

// Vectors are passed by value between functions that are always inlined; no call has the ABI that is warned about.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace kl_portable {
#define KL_VECTOR_BYTES 16
#include "kl_div_kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace kl_portable

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace kl_avx2 {
#define KL_VECTOR_BYTES 32
#include "kl_div_kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace kl_avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace kl_avx512 {
#define KL_VECTOR_BYTES 64
#include "kl_div_kernels.h"
#undef KL_VECTOR_BYTES
}  // namespace kl_avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__

namespace fusedkl {
namespace {

// The unit of work and of summation: fixed, so that the sum has the same bits for any number of threads.
constexpr int64_t kChunk = 16384;

const KlKernels& kl_kernels() {
#if defined(__x86_64__)
  const char* isa = kernels().isa;
  if (strncmp(isa, "avx512", 6) == 0) return kl_avx512::kKernels;
  if (strcmp(isa, "avx2") == 0) return kl_avx2::kKernels;
#endif
  return kl_portable::kKernels;
}

void check_alike(const Tensor& input, const Tensor& target) {
  STD_TORCH_CHECK(input.is_cpu() && target.is_cpu(), "fusedkl kl_div: input and target must be on the CPU");
  STD_TORCH_CHECK(input.scalar_type() == target.scalar_type(), "fusedkl kl_div: input and target must have one dtype");
  STD_TORCH_CHECK(sizes_of(input) == sizes_of(target), "fusedkl kl_div: input and target must have one shape");
  STD_TORCH_CHECK(input.is_contiguous() && target.is_contiguous(), "fusedkl kl_div: input and target must be contiguous");
}

template <class F>
void for_chunks(int64_t numel, const F& f) {
  torch::stable::parallel_for(0, (numel + kChunk - 1) / kChunk, 2, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(c, c * kChunk, std::min(kChunk, numel - c * kChunk));
  });
}

Tensor kl_div_sum(const Tensor& input, const Tensor& target, bool log_target, double divisor) {
  check_alike(input, target);
  const DType dtype = dtype_of(input, "input");
  const auto sum = kl_kernels().sum[static_cast<int>(dtype)][log_target];
  const int64_t numel = input.numel();
  const void* x = input.const_data_ptr();
  const void* t = target.const_data_ptr();
  std::vector<double> sums(static_cast<size_t>(numel / kChunk + 1), 0.);
  for_chunks(numel, [&](int64_t c, int64_t first, int64_t n) { sums[c] = sum(at(x, dtype, first), at(t, dtype, first), n); });
  // pairwise: the error grows with the logarithm of the number of chunks
  for (size_t n = sums.size(); n > 1; n = (n + 1) / 2)
    for (size_t i = 0; i < (n + 1) / 2; ++i) sums[i] = 2 * i + 1 < n ? sums[2 * i] + sums[2 * i + 1] : sums[2 * i];
  Tensor out = torch::stable::new_empty(input, {}, input.scalar_type());
  store_double(out.mutable_data_ptr(), dtype, 0, sums[0] / divisor);
  return out;
}

std::tuple<Tensor, Tensor> kl_div_backward(const Tensor& grad, std::optional<Tensor> input, const Tensor& target, bool log_target,
                                           double divisor, bool input_grad, bool target_grad) {
  STD_TORCH_CHECK(input.has_value() || !target_grad, "fusedkl kl_div: the gradient to target needs input");
  STD_TORCH_CHECK(grad.is_cpu() && grad.numel() == 1 && grad.scalar_type() == target.scalar_type(),
                  "fusedkl kl_div: grad must be one number of target's dtype on the CPU");
  check_alike(input.value_or(target), target);
  const DType dtype = dtype_of(target, "target");
  auto fresh = [&](bool wanted) { return wanted ? new_gradient(target, dtype) : torch::stable::new_empty(target, {0}); };
  const Tensor dx = fresh(input_grad), dt = fresh(target_grad);
  if (!input_grad && !target_grad) return {dx, dt};
  const auto gradient = kl_kernels().gradient[static_cast<int>(dtype)][log_target][input_grad + 2 * target_grad - 1];
  const double g = load_double(grad.const_data_ptr(), dtype, 0) / divisor;
  const void* t = target.const_data_ptr();
  const void* x = target_grad ? input->const_data_ptr() : t;
  void* to_x = dx.mutable_data_ptr();
  void* to_t = dt.mutable_data_ptr();
  for_chunks(target.numel(), [&](int64_t, int64_t first, int64_t n) {
    gradient(g, at(x, dtype, first), at(t, dtype, first), at(to_x, dtype, input_grad ? first : 0),
             at(to_t, dtype, target_grad ? first : 0), n);
  });
  return {dx, dt};
}

}  // namespace
}  // namespace fusedkl

STABLE_TORCH_LIBRARY_IMPL(fusedkl, CPU, m) {
  m.impl("kl_div_sum", TORCH_BOX(&fusedkl::kl_div_sum));
  m.impl("kl_div_backward", TORCH_BOX(&fusedkl::kl_div_backward));
}

#endif  // __GNUC__
