// 4 float lanes in the vector extension of gcc and clang, lowered to whatever the target has; interface as in simd_avx512.h.
// The baseline of x86-64 and all of aarch64 run this. (MSVC has no such extension: Windows builds take clang-cl.)
#pragma once
#include "dtype.h"

namespace fusedkl {
namespace {

constexpr int kLanes = 4;
using vf = float __attribute__((vector_size(kLanes * 4)));
using vm = int32_t __attribute__((vector_size(kLanes * 4)));  // all bits of a lane, or none
using wide = double __attribute__((vector_size(kLanes * 8)));

#define SIMD_INLINE __attribute__((always_inline)) static inline

SIMD_INLINE vf set1(float a) { return vf{} + a; }
SIMD_INLINE vm bits(vf a) { return reinterpret_cast<vm>(a); }
SIMD_INLINE vf from_bits(vm a) { return reinterpret_cast<vf>(a); }
SIMD_INLINE vf select(vm m, vf yes, vf no) { return from_bits((m & bits(yes)) | (~m & bits(no))); }
SIMD_INLINE vf zero_unless(vm m, vf a) { return from_bits(m & bits(a)); }

SIMD_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
SIMD_INLINE vf fnma(vf a, vf b, vf c) { return c - a * b; }
// no fused instruction to rely on: the product of two floats is exact in double
SIMD_INLINE vf fma_exact(vf a, vf b, vf c) {
  return __builtin_convertvector(
      __builtin_convertvector(a, wide) * __builtin_convertvector(b, wide) + __builtin_convertvector(c, wide), vf);
}
SIMD_INLINE vf fnma_exact(vf a, vf b, vf c) { return fma_exact(-a, b, c); }
SIMD_INLINE vf max2(vf a, vf b) { return select(a > b, a, b); }
SIMD_INLINE vf min2(vf a, vf b) { return select(a < b, a, b); }
SIMD_INLINE vf abs1(vf a) { return from_bits(bits(a) & 0x7fffffff); }
SIMD_INLINE vf max_abs(vf a, vf b) { return max2(abs1(b), a); }
// adding and taking away 1.5 * 2^23 rounds to an integer; exact for |a| < 2^22, larger values only occur where they are discarded
SIMD_INLINE vf round_even(vf a) { return (a + 0x1.8p23f) - 0x1.8p23f; }
SIMD_INLINE float sum_lanes(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
SIMD_INLINE float max_lanes(vf a) {
  float m = a[0];
  for (int j = 1; j < kLanes; j++) m = a[j] > m ? a[j] : m;
  return m;
}

SIMD_INLINE vm equal(vf a, vf b) { return a == b; }
SIMD_INLINE vm not_above(vf a, vf b) { return a <= b; }
SIMD_INLINE vm mask_and(vm a, vm b) { return a & b; }
SIMD_INLINE vm mask_or(vm a, vm b) { return a | b; }
SIMD_INLINE vm mask_not(vm a) { return ~a; }
SIMD_INLINE bool any(vm a) {
  const auto pairs = reinterpret_cast<int64_t __attribute__((vector_size(kLanes * 4)))>(a);
  return (pairs[0] | pairs[1]) != 0;
}

SIMD_INLINE bool all(vm a) { return !any(~a); }

// NaN must not reach the conversion to int; what it multiplies is NaN then, so any finite power will do
SIMD_INLINE vf clamp_exponent(vf t) { return min2(set1(128.f), max2(set1(-127.f), t)); }
SIMD_INLINE vf pow2_int(vf k) {
  k = clamp_exponent(k);
  k = zero_unless(k == k, k);
  return from_bits((__builtin_convertvector(k, vm) + 127) << 23);
}
SIMD_INLINE vf exponent_of(vf a) { return __builtin_convertvector((bits(a * set1(1.41421356f)) >> 23) - 127, vf); }
SIMD_INLINE vf floor1(vf a) {  // |a| <= 128
  const vf r = round_even(a);
  return r - from_bits((r > a) & bits(set1(1.f)));
}
SIMD_INLINE vf exp2_fraction(vf t) {
  t = clamp_exponent(t);
  return t - floor1(t);
}
SIMD_INLINE vf scale_floor(vf p, vf t) { return p * pow2_int(floor1(clamp_exponent(t))); }

template <DType D>
SIMD_INLINE vf load1(const void* base, int64_t i) {
  vf a;
  if constexpr (D == DType::f32) {
    memcpy(&a, static_cast<const float*>(base) + i, sizeof a);
  } else {
    for (int j = 0; j < kLanes; j++) a[j] = load_float<D>(base, i + j);
  }
  return a;
}

template <DType D>
SIMD_INLINE void load2(const void* base, int64_t i, vf& a, vf& b) {
  a = load1<D>(base, i);
  b = load1<D>(base, i + kLanes);
}

template <DType D>
SIMD_INLINE void store2(void* base, int64_t i, vf a, vf b) {
  if constexpr (D == DType::f32) {
    memcpy(static_cast<float*>(base) + i, &a, sizeof a);
    memcpy(static_cast<float*>(base) + i + kLanes, &b, sizeof b);
  } else {
    for (int j = 0; j < 2 * kLanes; j++) {
      const float f = j < kLanes ? a[j] : b[j - kLanes];
      static_cast<uint16_t*>(base)[i + j] = D == DType::bf16 ? float_to_bf16(f) : float_to_half(f);
    }
  }
}

}  // namespace
}  // namespace fusedkl
