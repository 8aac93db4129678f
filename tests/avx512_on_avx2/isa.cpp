// What csrc/cpu/isa_avx512.cpp does, on the intrinsics beside this file: its table is there on every machine with AVX2.
// EMULATE_BF16: csrc/cpu/isa_avx512_bf16.cpp instead. For g++ alone, as the rest of this folder.
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cpu/job.h"

#include <immintrin.h>

// Vectors are passed by value between functions that are always inlined; no call has the ABI that is warned about.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace fusedkl {
namespace {
#include "intrinsics.h"
}
}  // namespace fusedkl

#if defined(EMULATE_BF16)
#define FUSEDKL_BF16_INSTRUCTIONS
#define TABLE_OF avx512_bf16_kernels
#define TABLE_NAME "avx512_bf16"
#else
#define TABLE_OF avx512_kernels
#define TABLE_NAME "avx512"
#endif

#include "cpu/simd_avx512.h"
#include "cpu/kernels.h"

namespace fusedkl {
static const KernelTable kEmulatedKernels = FUSEDKL_KERNEL_TABLE(TABLE_NAME);
}

#pragma GCC pop_options

namespace fusedkl {
const KernelTable* TABLE_OF() { return &kEmulatedKernels; }
}  // namespace fusedkl
