// The intrinsics beside this file as a library for ctypes, and the machine's own for comparison.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wpsabi"

// First, as intrinsics.h takes macros of the system's away.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace real {
#include "operations.h"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace emulated {
#include "intrinsics.h"
#include "operations.h"
}  // namespace emulated
#pragma GCC pop_options

namespace {

constexpr size_t kOperations = 30;

// mxcsr: what the kernels set while they run, or 0
template <class Apply, class ApplyBf16>
void run(const float* x, const float* y, const float* z, size_t vectors, unsigned mxcsr, uint32_t* out, Apply apply,
         ApplyBf16 bf16) {
  const unsigned saved = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(saved | mxcsr);
  for (size_t v = 0; v < vectors; v++, x += 16, y += 16, z += 16, out += 16 * kOperations) {
    apply(x, y, z, out);
    bf16(x, y, out + 16 * (kOperations - 1));
  }
  __builtin_ia32_ldmxcsr(saved);
}

}  // namespace

extern "C" void run_emulated(const float* x, const float* y, const float* z, size_t vectors, unsigned mxcsr, uint32_t* out) {
  run(x, y, z, vectors, mxcsr, out, emulated::apply, emulated::apply_bf16);
}

// 0: the machine has no AVX-512; 1: it has, but not of bf16, whose results are 0
extern "C" int run_real(const float* x, const float* y, const float* z, size_t vectors, unsigned mxcsr, uint32_t* out) {
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return 0;
  const bool bf16 = __builtin_cpu_supports("avx512bf16");
  auto zeros = [](const float*, const float*, uint32_t* to) { memset(to, 0, 64); };
  if (bf16) run(x, y, z, vectors, mxcsr, out, real::apply, real::apply_bf16);
  else run(x, y, z, vectors, mxcsr, out, real::apply, zeros);
  return bf16 ? 2 : 1;
}
