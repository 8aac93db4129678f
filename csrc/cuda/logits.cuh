// Reading and writing logits: element types, 16-byte vectors, and rows at any alignment.
#pragma once
#include "../cpu/dtype.h"
#include "device.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fusedkl {
namespace gpu {

constexpr int kChunk = 8;  // elements that a thread reads at once: one 16-byte vector of 16-bit logits, two of fp32

template <DType D>
constexpr int kSizeOf = D == DType::f32 ? 4 : 2;
template <DType D>
constexpr int kWordsOf = kChunk * kSizeOf<D> / 4;

template <DType D>
struct Chunk {
  uint32_t word[kWordsOf<D>];
};

// elements 2i and 2i + 1 in fp32
template <DType D>
FUSEDKL_DEVICE F2 pair_of(const Chunk<D>& c, int i) {
  if constexpr (D == DType::f32) return {as_float(c.word[2 * i]), as_float(c.word[2 * i + 1])};
  const uint32_t w = c.word[i];
  if constexpr (D == DType::bf16) return {as_float(w << 16), as_float(w & 0xffff0000u)};
  __half2 h;
  memcpy(static_cast<void*>(&h), &w, 4);
  const float2 f = __half22float2(h);
  return {f.x, f.y};
}

template <DType D>
FUSEDKL_DEVICE uint32_t pack_pair(F2 v) {
  uint32_t w;
  if constexpr (D == DType::bf16) {
    const __nv_bfloat162 h = __floats2bfloat162_rn(v.x, v.y);
    memcpy(&w, &h, 4);
  } else {
    const __half2 h = __floats2half2_rn(v.x, v.y);
    memcpy(&w, &h, 4);
  }
  return w;
}

template <DType D>
FUSEDKL_DEVICE void set_pair(Chunk<D>& c, int i, F2 v) {
  if constexpr (D == DType::f32) {
    c.word[2 * i] = as_bits(v.x);
    c.word[2 * i + 1] = as_bits(v.y);
  } else {
    c.word[i] = pack_pair<D>(v);
  }
}

template <DType D>
FUSEDKL_DEVICE double load_one(const char* base, int64_t i) {
  if constexpr (D == DType::f64) return reinterpret_cast<const double*>(base)[i];
  if constexpr (D == DType::f32) return reinterpret_cast<const float*>(base)[i];
  if constexpr (D == DType::bf16) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(base)[i]);
  return __half2float(reinterpret_cast<const __half*>(base)[i]);
}

template <DType D>
FUSEDKL_DEVICE void store_one(char* base, int64_t i, double v) {
  if constexpr (D == DType::f64) reinterpret_cast<double*>(base)[i] = v;
  else if constexpr (D == DType::f32) reinterpret_cast<float*>(base)[i] = static_cast<float>(v);
  else if constexpr (D == DType::bf16) reinterpret_cast<__nv_bfloat16*>(base)[i] = __float2bfloat16_rn(static_cast<float>(v));
  else reinterpret_cast<__half*>(base)[i] = __float2half_rn(static_cast<float>(v));
}

FUSEDKL_HD static inline int64_t bytes_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }

// where speed is no matter
FUSEDKL_DEVICE double load_any(const char* base, DType d, int64_t i) {
  switch (d) {
    case DType::f64: return load_one<DType::f64>(base, i);
    case DType::f32: return load_one<DType::f32>(base, i);
    case DType::bf16: return load_one<DType::bf16>(base, i);
    default: return load_one<DType::f16>(base, i);
  }
}
FUSEDKL_DEVICE void store_any(char* base, DType d, int64_t i, double v) {
  switch (d) {
    case DType::f64: return store_one<DType::f64>(base, i, v);
    case DType::f32: return store_one<DType::f32>(base, i, v);
    case DType::bf16: return store_one<DType::bf16>(base, i, v);
    default: return store_one<DType::f16>(base, i, v);
  }
}

// Largest element of a chunk, NaN ignored. Packed for 16 bits: half an instruction per logit.
template <DType D, int N>
FUSEDKL_DEVICE float max_of(const Chunk<D> (&c)[N]) {
  if constexpr (D == DType::f32) {
    float m = -INFINITY;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
      for (int i = 0; i < kWordsOf<D>; i++) m = fmaxf(m, as_float(c[j].word[i]));
    return m;
  } else {
    using Packed = std::conditional_t<D == DType::bf16, __nv_bfloat162, __half2>;
    auto packed = [&](int i) {
      Packed h;
      memcpy(static_cast<void*>(&h), &c[i / kWordsOf<D>].word[i % kWordsOf<D>], 4);
      return h;
    };
    Packed m = packed(0);
#pragma unroll
    for (int i = 1; i < N * kWordsOf<D>; i++) m = __hmax2(m, packed(i));
    Chunk<D> one;
    memcpy(&one.word[0], &m, 4);
    const F2 f = pair_of(one, 0);
    return fmaxf(f.x, f.y);
  }
}

// The 16-byte vectors of one chunk of an aligned row.
template <DType D, bool SHARED>
FUSEDKL_DEVICE Chunk<D> aligned_chunk(const char* row, int i) {
  const uint4* const from = reinterpret_cast<const uint4*>(row) + static_cast<int64_t>(i) * (kWordsOf<D> / 4);
  Chunk<D> c;
#pragma unroll
  for (int j = 0; j < kWordsOf<D> / 4; j++) {
    const uint4 v = SHARED ? from[j] : __ldcs(from + j);
    memcpy(&c.word[4 * j], &v, 16);
  }
  return c;
}

// A chunk that begins `shift` bytes after the vector at `from`, put together from that one and the next.
template <DType D>
FUSEDKL_DEVICE Chunk<D> shifted_chunk(const uint4* from, int shift) {
  constexpr int kWords = kWordsOf<D>;
  uint32_t w[kWords + 4];
#pragma unroll
  for (int j = 0; j <= kWords / 4; j++) {
    // the neighbouring thread reads this vector too: keep it in cache; none is read beyond the last chunk's
    const uint4 a = j < kWords / 4 || shift > 0 ? __ldg(from + j) : uint4{0, 0, 0, 0};
    memcpy(&w[4 * j], &a, 16);
  }
  // by 8, 4 and 2 bytes: indices into registers must be constants
#pragma unroll
  for (int k = 0; k < kWords + 2; k++) w[k] = shift & 8 ? w[k + 2] : w[k];
#pragma unroll
  for (int k = 0; k < kWords + 1; k++) w[k] = shift & 4 ? w[k + 1] : w[k];
  Chunk<D> c;
#pragma unroll
  for (int k = 0; k < kWords; k++) c.word[k] = kSizeOf<D> == 2 && shift & 2 ? w[k] >> 16 | w[k + 1] << 16 : w[k];
  return c;
}

// One segment of both rows as the forward adds it: chunk i is tokens 8i to 8i + 7 wherever the rows lie, so that alignment cannot
// show in a sum. ANYWHERE: rows that do not begin on 16 bytes; the loads then are of every aligned 16 bytes that hold one of the
// segment's: memory comes in larger pieces than those, so what is read besides exists.
template <DType X, DType Y, bool ANYWHERE>
struct SweepView {
  const char *x, *y;
  int length, chunks;
  int shift_x, shift_y;  // bytes from the aligned vector before

  FUSEDKL_DEVICE SweepView(const char* x_, const char* y_, int length_)
      : x(x_),
        y(y_),
        length(length_),
        chunks(length_ / kChunk),
        shift_x(static_cast<int>(reinterpret_cast<uintptr_t>(x_) % 16)),
        shift_y(static_cast<int>(reinterpret_cast<uintptr_t>(y_) % 16)) {}

  FUSEDKL_DEVICE int ragged() const { return length - chunks * kChunk; }
  FUSEDKL_DEVICE int ragged_index(int i) const { return chunks * kChunk + i; }
  FUSEDKL_DEVICE Chunk<X> policy(int i) const { return chunk<X>(x, shift_x, i); }
  FUSEDKL_DEVICE Chunk<Y> reference(int i) const { return chunk<Y>(y, shift_y, i); }

 private:
  template <DType D>
  FUSEDKL_DEVICE Chunk<D> chunk(const char* row, int shift, int i) const {
    if constexpr (!ANYWHERE) return aligned_chunk<D, false>(row, i);
    const char* const at = row + static_cast<int64_t>(i) * kChunk * kSizeOf<D>;
    return shifted_chunk<D>(reinterpret_cast<const uint4*>(at - shift), shift);
  }
};

// One segment of a row, or of a pair of rows: a few ragged elements at its ends, chunks of 8 in between.
// The policy's chunks lie on 16 bytes. The reference's do if both rows are misaligned alike; else (SHIFTED) its vectors are put
// together from two aligned ones. No load leaves the segment.
// SHARED: the segment is a copy in shared memory, at the same alignment.
template <DType X, DType Y, bool SHIFTED, bool SHARED = false>
struct SegmentView {
  static constexpr bool kShared = SHARED;
  const char *x, *y;  // first element
  int length;
  int head;    // elements before the first chunk
  int chunks;  // of both rows
  int shift;   // bytes between an aligned vector and the reference's chunk

  FUSEDKL_DEVICE SegmentView(const char* x_, const char* y_, int length_) : x(x_), y(y_), length(length_) {
    const int off_x = static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16) / kSizeOf<X>, period = 16 / kSizeOf<X>;
    head = (period - off_x) % period;
    // where both are aligned alike but the reference has the longer period (fp32 policy, 16-bit reference)
    if constexpr (!SHIFTED && kSizeOf<Y> < kSizeOf<X>)
      while (reinterpret_cast<uintptr_t>(y + head * kSizeOf<Y>) % 16 != 0 && head < 2 * kChunk) head += period;
    shift = 0;
    if constexpr (SHIFTED) {
      shift = static_cast<int>(reinterpret_cast<uintptr_t>(y + head * kSizeOf<Y>) % 16);
      if (shift > head * kSizeOf<Y>) head += kChunk;  // its first aligned vector must not begin before the segment
    }
    const int left = length - head;
    // a shifted chunk needs one more vector
    chunks = left <= 0 ? 0 : (left - (SHIFTED && shift > 0 ? (16 - shift) / kSizeOf<Y> : 0)) / kChunk;
    if (left <= 0) head = length;
    if (chunks < 0) chunks = 0;
  }

  FUSEDKL_DEVICE int ragged() const { return length - chunks * kChunk; }
  FUSEDKL_DEVICE int ragged_index(int i) const { return i < head ? i : i + chunks * kChunk; }

  FUSEDKL_DEVICE Chunk<X> policy(int i) const { return aligned_chunk<X, SHARED>(x + head * kSizeOf<X>, i); }

  FUSEDKL_DEVICE Chunk<Y> reference(int i) const {
    const char* const row = y + head * kSizeOf<Y> - shift;
    if constexpr (!SHIFTED) return aligned_chunk<Y, SHARED>(row, i);
    return shifted_chunk<Y>(reinterpret_cast<const uint4*>(row) + static_cast<int64_t>(i) * (kWordsOf<Y> / 4), shift);
  }
};

}  // namespace gpu
}  // namespace fusedkl
