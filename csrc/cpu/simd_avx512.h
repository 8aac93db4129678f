// 16 float lanes of AVX-512. Every simd_*.h has this interface, so block_kernels.h is written once.
// Everything has internal linkage: code compiled for one instruction set must never be merged into another's.
#pragma once
#include <immintrin.h>

#include "dtype.h"

namespace fusedkl {
namespace {

using vf = __m512;
constexpr int kLanes = 16;

#define SIMD_INLINE __attribute__((always_inline)) static inline

SIMD_INLINE vf set1(float v) { return _mm512_set1_ps(v); }
SIMD_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }    // a*b + c
SIMD_INLINE vf fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
// one rounding is required, not only welcome: arguments of exponentials
SIMD_INLINE vf fma_exact(vf a, vf b, vf c) { return fma(a, b, c); }
SIMD_INLINE vf fnma_exact(vf a, vf b, vf c) { return fnma(a, b, c); }
// NaN in `a` is dropped (b is returned), NaN in `b` is kept
SIMD_INLINE vf max2(vf a, vf b) { return _mm512_max_ps(a, b); }
SIMD_INLINE vf min2(vf a, vf b) { return _mm512_min_ps(a, b); }
SIMD_INLINE vf abs1(vf a) { return _mm512_abs_ps(a); }
SIMD_INLINE vf max_abs(vf a, vf b) { return _mm512_range_ps(a, b, 0x0b); }
SIMD_INLINE vf round_even(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
SIMD_INLINE float sum_lanes(vf a) { return _mm512_reduce_add_ps(a); }
SIMD_INLINE float max_lanes(vf a) { return _mm512_reduce_max_ps(a); }

using vm = __mmask16;
SIMD_INLINE vm equal(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
SIMD_INLINE vm not_above(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }  // a <= b; false for NaN
SIMD_INLINE vm mask_and(vm a, vm b) { return a & b; }
SIMD_INLINE vm mask_or(vm a, vm b) { return a | b; }
SIMD_INLINE vm mask_not(vm a) { return ~a; }
SIMD_INLINE bool any(vm a) { return a != 0; }
SIMD_INLINE bool all(vm a) { return _mm512_kortestc(a, a); }
SIMD_INLINE vf select(vm m, vf yes, vf no) { return _mm512_mask_mov_ps(no, m, yes); }
SIMD_INLINE vf zero_unless(vm m, vf a) { return _mm512_maskz_mov_ps(m, a); }

// 2^k for integral k; saturates to 0 and inf
SIMD_INLINE vf pow2_int(vf k) { return _mm512_scalef_ps(set1(1.f), k); }

// k with a = 2^k f, f in [sqrt(1/2), sqrt 2), for a > 0
SIMD_INLINE vf exponent_of(vf a) { return _mm512_getexp_ps(a * set1(1.41421356f)); }

// p(r) 2^floor(t) where r = t - floor(t): scalef floors its exponent itself, so -inf gives exactly 0 and nothing is clamped
SIMD_INLINE vf exp2_fraction(vf t) { return _mm512_reduce_ps(t, 0x09); }
SIMD_INLINE vf scale_floor(vf p, vf t) { return _mm512_scalef_ps(p, t); }

// 32 elements into two vectors. bf16 goes to even and odd lanes (a shift and a mask, no shuffle); store2 undoes it.
template <DType D>
SIMD_INLINE void load2(const void* base, int64_t i, vf& a, vf& b) {
  if constexpr (D == DType::f32) {
    a = _mm512_loadu_ps(static_cast<const float*>(base) + i);
    b = _mm512_loadu_ps(static_cast<const float*>(base) + i + 16);
  } else if constexpr (D == DType::bf16) {
    const __m512i v = _mm512_loadu_si512(static_cast<const uint16_t*>(base) + i);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(base) + i;
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
}

#if !defined(FUSEDKL_BF16_INSTRUCTIONS)
// round to nearest even in integers; NaN stays NaN
SIMD_INLINE __m512i bf16_bits_high(vf a) {
  const __m512i v = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(v, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
#endif

#if defined(FUSEDKL_BF16_INSTRUCTIONS)
// deals two halves back to even and odd places: 0, 16, 1, 17, ...
struct Deal {
  alignas(64) uint16_t index[32];
  constexpr Deal() : index() {
    for (int k = 0; k < 32; k++) index[k] = static_cast<uint16_t>((k >> 1) + 16 * (k & 1));
  }
};
constexpr Deal kDeal;
#endif

template <DType D>
SIMD_INLINE void store2(void* base, int64_t i, vf a, vf b) {
  if constexpr (D == DType::f32) {
    _mm512_storeu_ps(static_cast<float*>(base) + i, a);
    _mm512_storeu_ps(static_cast<float*>(base) + i + 16, b);
  } else if constexpr (D == DType::bf16) {
#if defined(FUSEDKL_BF16_INSTRUCTIONS)
    const __m512i both =
        _mm512_permutexvar_epi16(_mm512_load_si512(kDeal.index), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
#else
    const __m512i lo = _mm512_srli_epi32(bf16_bits_high(a), 16);
    const __m512i both = _mm512_mask_mov_epi16(lo, 0xaaaaaaaau, bf16_bits_high(b));
#endif
    _mm512_storeu_si512(static_cast<uint16_t*>(base) + i, both);
  } else {
    uint16_t* p = static_cast<uint16_t*>(base) + i;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

}  // namespace
}  // namespace fusedkl
