// Kernels for AVX2. The target is chosen here and not by compiler flags, so that setup.py stays plain; system headers come first,
// because an inline function of theirs compiled for this target could be merged into code for lesser machines.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "job.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "simd_avx2.h"
#include "kernels.h"

namespace fusedkl {
static const KernelTable kAvx2Kernels = FUSEDKL_KERNEL_TABLE("avx2");
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fusedkl {
const KernelTable* avx2_kernels() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &kAvx2Kernels
                                                                                                           : nullptr;
}
}  // namespace fusedkl
#else
namespace fusedkl {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace fusedkl
#endif
