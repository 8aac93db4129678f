// 8 float lanes in plain C++ loops that any compiler turns into whatever vectors the target has; interface as in simd_avx512.h.
// The baseline of x86-64 and all of aarch64 run this.
#pragma once
#include <math.h>

#include "dtype.h"

namespace fusedkl {
namespace {

constexpr int kLanes = 8;
struct vf {
  float v[kLanes];
};
struct vm {
  int32_t v[kLanes];
};

#define SIMD_INLINE static inline
#define FOR_LANES for (int j = 0; j < kLanes; j++)

SIMD_INLINE vf set1(float a) {
  vf r;
  FOR_LANES r.v[j] = a;
  return r;
}
SIMD_INLINE vf operator+(vf a, vf b) {
  FOR_LANES a.v[j] += b.v[j];
  return a;
}
SIMD_INLINE vf operator-(vf a, vf b) {
  FOR_LANES a.v[j] -= b.v[j];
  return a;
}
SIMD_INLINE vf operator*(vf a, vf b) {
  FOR_LANES a.v[j] *= b.v[j];
  return a;
}
SIMD_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
SIMD_INLINE vf fnma(vf a, vf b, vf c) { return c - a * b; }
// no fused instruction to rely on: the product of two floats is exact in double
SIMD_INLINE vf fma_exact(vf a, vf b, vf c) {
  FOR_LANES a.v[j] = static_cast<float>(static_cast<double>(a.v[j]) * b.v[j] + c.v[j]);
  return a;
}
SIMD_INLINE vf fnma_exact(vf a, vf b, vf c) {
  FOR_LANES a.v[j] = static_cast<float>(c.v[j] - static_cast<double>(a.v[j]) * b.v[j]);
  return a;
}
SIMD_INLINE vf max2(vf a, vf b) {
  FOR_LANES a.v[j] = a.v[j] > b.v[j] ? a.v[j] : b.v[j];
  return a;
}
SIMD_INLINE vf min2(vf a, vf b) {
  FOR_LANES a.v[j] = a.v[j] < b.v[j] ? a.v[j] : b.v[j];
  return a;
}
SIMD_INLINE vf abs1(vf a) {
  FOR_LANES a.v[j] = fabsf(a.v[j]);
  return a;
}
SIMD_INLINE vf max_abs(vf a, vf b) { return max2(abs1(b), a); }
// adding and taking away 1.5 * 2^23 rounds to an integer; exact for |a| < 2^22, larger values only occur where they are discarded
SIMD_INLINE vf round_even(vf a) {
  const vf magic = set1(0x1.8p23f);
  return (a + magic) - magic;
}
SIMD_INLINE float sum_lanes(vf a) { return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7])); }
SIMD_INLINE float max_lanes(vf a) {
  float m = a.v[0];
  FOR_LANES m = a.v[j] > m ? a.v[j] : m;
  return m;
}

SIMD_INLINE vm equal(vf a, vf b) {
  vm r;
  FOR_LANES r.v[j] = a.v[j] == b.v[j] ? -1 : 0;
  return r;
}
SIMD_INLINE vm not_above(vf a, vf b) {
  vm r;
  FOR_LANES r.v[j] = a.v[j] <= b.v[j] ? -1 : 0;
  return r;
}
SIMD_INLINE vm mask_and(vm a, vm b) {
  FOR_LANES a.v[j] &= b.v[j];
  return a;
}
SIMD_INLINE vm mask_or(vm a, vm b) {
  FOR_LANES a.v[j] |= b.v[j];
  return a;
}
SIMD_INLINE vm mask_not(vm a) {
  FOR_LANES a.v[j] = ~a.v[j];
  return a;
}
SIMD_INLINE int count(vm a) {
  int n = 0;
  FOR_LANES n -= a.v[j];
  return n;
}
SIMD_INLINE bool any(vm a) { return count(a) != 0; }
SIMD_INLINE vf select(vm m, vf yes, vf no) {
  FOR_LANES no.v[j] = m.v[j] ? yes.v[j] : no.v[j];
  return no;
}
SIMD_INLINE vf zero_unless(vm m, vf a) { return select(m, a, set1(0.f)); }

SIMD_INLINE vf clamp_exponent(vf t) { return min2(set1(128.f), max2(set1(-127.f), t)); }
// |a| <= 128 here; floorf would be a library call per lane on the x86-64 baseline
SIMD_INLINE vf floor1(vf a) {
  vf r = round_even(a);
  FOR_LANES r.v[j] -= r.v[j] > a.v[j] ? 1.f : 0.f;
  return r;
}
// NaN must not reach the conversion to int; the value multiplied by the result is NaN then, so any finite power will do
SIMD_INLINE vf pow2_int(vf k) {
  k = clamp_exponent(k);
  FOR_LANES k.v[j] = bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(k.v[j] == k.v[j] ? k.v[j] : 0.f) + 127) << 23);
  return k;
}
SIMD_INLINE vf exp2_fraction(vf t) {
  t = clamp_exponent(t);
  return t - floor1(t);
}
SIMD_INLINE vf scale_floor(vf p, vf t) { return p * pow2_int(floor1(clamp_exponent(t))); }

template <DType D>
SIMD_INLINE void load2(const void* base, int64_t i, vf& a, vf& b) {
  FOR_LANES a.v[j] = load_float<D>(base, i + j);
  FOR_LANES b.v[j] = load_float<D>(base, i + kLanes + j);
}

template <DType D>
SIMD_INLINE void store2(void* base, int64_t i, vf a, vf b) {
  for (int j = 0; j < 2 * kLanes; j++) {
    const float f = j < kLanes ? a.v[j] : b.v[j - kLanes];
    if constexpr (D == DType::f32) static_cast<float*>(base)[i + j] = f;
    else static_cast<uint16_t*>(base)[i + j] = D == DType::bf16 ? float_to_bf16(f) : float_to_half(f);
  }
}

}  // namespace
}  // namespace fusedkl
