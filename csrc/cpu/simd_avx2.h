// 8 float lanes of AVX2 + FMA + F16C; interface as in simd_avx512.h.
#pragma once
#include <immintrin.h>

#include "dtype.h"

namespace fusedkl {
namespace {

using vf = __m256;
constexpr int kLanes = 8;

#define SIMD_INLINE __attribute__((always_inline)) static inline

SIMD_INLINE vf set1(float v) { return _mm256_set1_ps(v); }
SIMD_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
SIMD_INLINE vf fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
SIMD_INLINE vf fma_exact(vf a, vf b, vf c) { return fma(a, b, c); }
SIMD_INLINE vf fnma_exact(vf a, vf b, vf c) { return fnma(a, b, c); }
SIMD_INLINE vf max2(vf a, vf b) { return _mm256_max_ps(a, b); }
SIMD_INLINE vf min2(vf a, vf b) { return _mm256_min_ps(a, b); }
SIMD_INLINE vf abs1(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
SIMD_INLINE vf max_abs(vf a, vf b) { return _mm256_max_ps(abs1(b), a); }  // a >= 0; NaN in b is dropped
SIMD_INLINE vf round_even(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

SIMD_INLINE float sum_lanes(vf v) {
  __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}

SIMD_INLINE float max_lanes(vf v) {
  __m128 a = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)));
}

using vm = __m256;
SIMD_INLINE vm equal(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
SIMD_INLINE vm not_above(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
SIMD_INLINE vm mask_and(vm a, vm b) { return _mm256_and_ps(a, b); }
SIMD_INLINE vm mask_or(vm a, vm b) { return _mm256_or_ps(a, b); }
SIMD_INLINE vm mask_not(vm a) { return _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(-1))); }
SIMD_INLINE bool any(vm a) { return _mm256_movemask_ps(a) != 0; }
SIMD_INLINE bool all(vm a) { return _mm256_movemask_ps(a) == 0xff; }
SIMD_INLINE vf select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
SIMD_INLINE vf zero_unless(vm m, vf a) { return _mm256_and_ps(m, a); }

// 2^k for integral k by its exponent bits. The clamp makes underflow exactly 0 and overflow exactly inf: an unclamped
// exponent would wrap, and an overflow that looks finite passes every range check. NaN passes through the clamp.
SIMD_INLINE vf pow2_int(vf k) {
  k = min2(set1(128.f), max2(set1(-127.f), k));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(k), _mm256_set1_epi32(127)), 23));
}

SIMD_INLINE vf exponent_of(vf a) {
  const __m256i field = _mm256_srli_epi32(_mm256_castps_si256(a * set1(1.41421356f)), 23);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(field, _mm256_set1_epi32(127)));
}
SIMD_INLINE vf clamp_exponent(vf t) { return min2(set1(128.f), max2(set1(-127.f), t)); }
SIMD_INLINE vf exp2_fraction(vf t) {
  t = clamp_exponent(t);
  return _mm256_sub_ps(t, _mm256_floor_ps(t));
}
SIMD_INLINE vf scale_floor(vf p, vf t) { return _mm256_mul_ps(p, pow2_int(_mm256_floor_ps(clamp_exponent(t)))); }

SIMD_INLINE vf from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

template <DType D>
SIMD_INLINE void load2(const void* base, int64_t i, vf& a, vf& b) {
  if constexpr (D == DType::f32) {
    a = _mm256_loadu_ps(static_cast<const float*>(base) + i);
    b = _mm256_loadu_ps(static_cast<const float*>(base) + i + 8);
  } else if constexpr (D == DType::bf16) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + i));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(base) + i;
    a = from_half(p);
    b = from_half(p + 8);
  }
}

SIMD_INLINE __m256i bf16_bits_high(vf a) {
  const __m256i v = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(v, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(v, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan));
}

template <DType D>
SIMD_INLINE void store2(void* base, int64_t i, vf a, vf b) {
  if constexpr (D == DType::f32) {
    _mm256_storeu_ps(static_cast<float*>(base) + i, a);
    _mm256_storeu_ps(static_cast<float*>(base) + i + 8, b);
  } else if constexpr (D == DType::bf16) {
    const __m256i both = _mm256_blend_epi16(_mm256_srli_epi32(bf16_bits_high(a), 16), bf16_bits_high(b), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(base) + i), both);
  } else {
    uint16_t* p = static_cast<uint16_t*>(base) + i;
    constexpr int kRound = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, kRound));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, kRound));
  }
}

}  // namespace
}  // namespace fusedkl
