// What device code needs beyond plain C++. Under FUSEDKL_ON_CPU (tests/cuda_on_cpu) the same kernels are compiled by a C++
// compiler, against a shim that runs every CUDA thread as a fiber.
#pragma once
#if defined(FUSEDKL_ON_CPU)
#include "shim.h"
#else
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../gradient_math.h"

namespace fusedkl {
namespace gpu {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

#define FUSEDKL_DEVICE __device__ __forceinline__

// 2^v, weights below 2^-126 counted as 0
FUSEDKL_MEMBER float exp2_fast(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  const float r = exp2f(v);
  return r < 0x1p-126f ? 0.f : r;
#endif
}

// a / b to two units in the last place, for b below 2^126
FUSEDKL_MEMBER float divide_fast(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// log2 v, right to 2^-22 absolutely where v is near 1, relatively elsewhere
FUSEDKL_MEMBER float log2_fast(float v) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
#else
  return log2f(v);
#endif
}

FUSEDKL_DEVICE float as_float(uint32_t v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
FUSEDKL_DEVICE uint32_t as_bits(float f) {
  uint32_t v;
  memcpy(&v, &f, 4);
  return v;
}

// Two tokens at a time: sm_100 issues one instruction for both.
struct F2 {
  float x, y;
};
FUSEDKL_DEVICE F2 both(float v) { return {v, v}; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
FUSEDKL_DEVICE F2 fma2(F2 a, F2 b, F2 c) {
  const float2 r = __ffma2_rn(make_float2(a.x, a.y), make_float2(b.x, b.y), make_float2(c.x, c.y));
  return {r.x, r.y};
}
FUSEDKL_DEVICE F2 operator+(F2 a, F2 b) {
  const float2 r = __fadd2_rn(make_float2(a.x, a.y), make_float2(b.x, b.y));
  return {r.x, r.y};
}
FUSEDKL_DEVICE F2 operator*(F2 a, F2 b) {
  const float2 r = __fmul2_rn(make_float2(a.x, a.y), make_float2(b.x, b.y));
  return {r.x, r.y};
}
FUSEDKL_DEVICE F2 operator-(F2 a, F2 b) { return fma2(b, both(-1.f), a); }
#else
FUSEDKL_DEVICE F2 fma2(F2 a, F2 b, F2 c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
// the intrinsics are never contracted: an fma where the code says add and multiply would change x - y
#if defined(__CUDA_ARCH__)
FUSEDKL_DEVICE F2 operator+(F2 a, F2 b) { return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)}; }
FUSEDKL_DEVICE F2 operator*(F2 a, F2 b) { return {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)}; }
FUSEDKL_DEVICE F2 operator-(F2 a, F2 b) { return {__fsub_rn(a.x, b.x), __fsub_rn(a.y, b.y)}; }
#else
FUSEDKL_DEVICE F2 operator+(F2 a, F2 b) { return {a.x + b.x, a.y + b.y}; }
FUSEDKL_DEVICE F2 operator*(F2 a, F2 b) { return {a.x * b.x, a.y * b.y}; }
FUSEDKL_DEVICE F2 operator-(F2 a, F2 b) { return {a.x - b.x, a.y - b.y}; }
#endif
#endif

FUSEDKL_DEVICE F2 exp2_fast(F2 v) { return {exp2_fast(v.x), exp2_fast(v.y)}; }
FUSEDKL_DEVICE F2 absolute(F2 v) { return {fabsf(v.x), fabsf(v.y)}; }
// a where |v| <= limit; NaN takes b
FUSEDKL_DEVICE F2 choose_near(F2 v, float limit, F2 a, F2 b) {
  return {fabsf(v.x) <= limit ? a.x : b.x, fabsf(v.y) <= limit ? a.y : b.y};
}
// of a >= 0 and |b|; NaN if either is
FUSEDKL_DEVICE float max_magnitude(float a, float b) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(fabsf(b)));
  return r;
#else
  return a >= fabsf(b) ? a : a != a ? a : fabsf(b);
#endif
}
FUSEDKL_DEVICE float fold(F2 v) { return v.x + v.y; }

FUSEDKL_DEVICE float warp_max(float v) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, o));
  return v;
}

// the same bits in every lane: both partners of a step add the same two numbers
template <class T>
FUSEDKL_DEVICE T warp_sum(T v) {
#pragma unroll
  for (int o = kWarp / 2; o > 0; o >>= 1) v += __shfl_xor_sync(kAllLanes, v, o);
  return v;
}

// A launch's dynamic shared memory; aligned for any use.
FUSEDKL_DEVICE unsigned char* dynamic_shared() {
#if defined(FUSEDKL_ON_CPU)
  return shim::dynamic_shared();
#else
  extern __shared__ __align__(128) unsigned char fusedkl_dynamic[];
  return fusedkl_dynamic;
#endif
}

// The blocks that can read each other's shared memory; one block where the device has no clusters.
class Cluster {
 public:
#if defined(FUSEDKL_ON_CPU)
  int size() const { return shim::cluster_size(); }
  int rank() const { return shim::cluster_rank(); }
  void sync() const { shim::barrier(-1, true); }
  template <class T>
  const T* peer(T* own, int rank) const {
    return shim::peer(own, rank);
  }
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  FUSEDKL_DEVICE int size() const { return static_cast<int>(cooperative_groups::this_cluster().num_blocks()); }
  FUSEDKL_DEVICE int rank() const { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
  FUSEDKL_DEVICE void sync() const { cooperative_groups::this_cluster().sync(); }
  template <class T>
  FUSEDKL_DEVICE const T* peer(T* own, int rank) const {
    return cooperative_groups::this_cluster().map_shared_rank(own, rank);
  }
#else
  FUSEDKL_DEVICE int size() const { return 1; }
  FUSEDKL_DEVICE int rank() const { return 0; }
  FUSEDKL_DEVICE void sync() const { __syncthreads(); }
  template <class T>
  FUSEDKL_DEVICE const T* peer(T* own, int) const {
    return own;
  }
#endif
};

// 4 or 16 bytes from global to shared memory, there after wait_for_copies() and a barrier
template <int BYTES>
FUSEDKL_DEVICE void copy_async(void* to, const void* from) {
  __pipeline_memcpy_async(to, from, BYTES);
}
FUSEDKL_DEVICE void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

FUSEDKL_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
FUSEDKL_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

}  // namespace gpu
}  // namespace fusedkl
