// Kernels for AVX-512 with the bf16 conversions: fewer instructions for the same results, but for numbers below 1e-38, which become 0.
// The target is chosen here and not by compiler flags, so that setup.py stays plain; system headers come first, because an inline
// function of theirs compiled for this target could be merged into code for lesser machines.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "job.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

#define FUSEDKL_BF16_INSTRUCTIONS  // not __AVX512BF16__, which g++ before 14 does not define for a target chosen by a pragma
#include "simd_avx512.h"
#include "kernels.h"

namespace fusedkl {
static const KernelTable kAvx512Bf16Kernels = FUSEDKL_KERNEL_TABLE("avx512_bf16");
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedkl {
const KernelTable* avx512_bf16_kernels() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16")
             ? &kAvx512Bf16Kernels
             : nullptr;
}
}  // namespace fusedkl
#else
namespace fusedkl {
const KernelTable* avx512_bf16_kernels() { return nullptr; }
}  // namespace fusedkl
#endif
