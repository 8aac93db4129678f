// Kernels for AVX-512. The target is chosen here and not by compiler flags, so that setup.py stays plain; system headers come first,
// because an inline function of theirs compiled for this target could be merged into code for lesser machines.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "job.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside gcc 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "simd_avx512.h"
#include "kernels.h"

namespace fusedkl {
static const KernelTable kAvx512Kernels = FUSEDKL_KERNEL_TABLE("avx512");
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedkl {
const KernelTable* avx512_kernels() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl")
             ? &kAvx512Kernels
             : nullptr;
}
}  // namespace fusedkl
#else
namespace fusedkl {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace fusedkl
#endif
