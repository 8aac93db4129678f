// Element types of logits and their scalar conversions.
#pragma once
#include <stdint.h>
#include <string.h>

namespace fusedkl {

// apart, inside kernels only: two rows of float, of which the policy's is given by how far it is from the reference's.
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, apart = 4 };

static constexpr DType stored(DType d) { return d == DType::apart ? DType::f32 : d; }
static constexpr int64_t size_of(DType d) { return d == DType::f64 ? 8 : stored(d) == DType::f32 ? 4 : 2; }

static inline float bits_to_float(uint32_t v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}

static inline uint32_t float_to_bits(float f) {
  uint32_t v;
  memcpy(&v, &f, 4);
  return v;
}

static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent != 0) return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

static inline uint16_t float_to_half(float f) {
  const uint32_t v = float_to_bits(f), magnitude = v & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(v >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000)                         // subnormal: let the adder of a float of matching ulp do the rounding
    return sign | static_cast<uint16_t>(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
  return sign | static_cast<uint16_t>((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

static inline uint16_t float_to_bf16(float f) {
  const uint32_t v = float_to_bits(f);
  return f != f ? 0x7fc0 : static_cast<uint16_t>((v + 0x7fff + (v >> 16 & 1)) >> 16);
}

template <DType D>
static inline float load_float(const void* base, int64_t i) {
  if constexpr (D == DType::f32) return static_cast<const float*>(base)[i];
  const uint16_t h = static_cast<const uint16_t*>(base)[i];
  return D == DType::bf16 ? bits_to_float(static_cast<uint32_t>(h) << 16) : half_to_float(h);
}

static inline double load_double(const void* base, DType d, int64_t i) {
  switch (d) {
    case DType::f64: return static_cast<const double*>(base)[i];
    case DType::f32: return load_float<DType::f32>(base, i);
    case DType::bf16: return load_float<DType::bf16>(base, i);
    default: return load_float<DType::f16>(base, i);
  }
}

static inline void store_double(void* base, DType d, int64_t i, double v) {
  switch (d) {
    case DType::f64: static_cast<double*>(base)[i] = v; break;
    case DType::f32: static_cast<float*>(base)[i] = static_cast<float>(v); break;
    case DType::bf16: static_cast<uint16_t*>(base)[i] = float_to_bf16(static_cast<float>(v)); break;
    default: static_cast<uint16_t*>(base)[i] = float_to_half(static_cast<float>(v)); break;
  }
}

static inline const void* at(const void* base, DType d, int64_t i) { return static_cast<const char*>(base) + i * size_of(d); }
static inline void* at(void* base, DType d, int64_t i) { return static_cast<char*>(base) + i * size_of(d); }

}  // namespace fusedkl
