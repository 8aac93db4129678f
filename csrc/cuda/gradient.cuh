// Gradients: the logits are read once more, each gradient is written once; of the forward only RowState is needed. A thread
// loads a chunk before it stores one at the same place, so a gradient may replace its own logits.
#pragma once
#include <float.h>

#include "sums.cuh"
#include "launch.h"

namespace fusedkl {
namespace gpu {

constexpr int kGradientThreads = 256;
// Blocks of a multiprocessor: what the registers of the general sweep allow, where fp32 is computed in pairs and where it is not.
template <DType X, DType Y>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kGeneralBlocks = X == DType::f32 && Y == DType::f32 ? 1 : 2;
#else
constexpr int kGeneralBlocks = 3;
#endif

// What is to be done with a row in the sweep: nothing where it is left to the exact path, or to that of family.cuh.
constexpr int kSweep = 0, kExact = 1, kFamily = 2;

template <DType X, DType Y>
FUSEDKL_DEVICE F2 difference(F2 x, F2 y, const GradientFrame::TwoFloats& about) {
  const F2 v = centred<X, Y>(x, y, both(about.high), both(about.low));
  if constexpr (kExactDifference<X, Y>) return v;
  return v - both(about.low);  // 16-bit logits have one float of centre in the forward, and two here
}

// d/dx of forward KL: q expm1(l), as a series near l = 0 and as p - q elsewhere; the latter is 0 - 0 at a token absent from both.
template <DType X, DType Y>
FUSEDKL_DEVICE F2 forward_pair(const GradientFrame& f, F2 x, F2 y) {
  constexpr bool kFine = X == DType::f32;  // as exact as the store
  const F2 slope = both(f.slope), v = difference<X, Y>(x, y, f.ratio);
  const F2 q = exp2_fast(fma2(y, slope, both(-f.q.shift))) * both(f.q.weight * f.forward);
  const F2 p = exp2_fast(fma2(x, slope, both(-f.p.shift)));
  const float i1 = f.inv_t, i2 = i1 * i1;
  F2 series = both(0.5f * i2);
  if constexpr (kFine) {
    const float i3 = i2 * i1, i4 = i2 * i2;
    series = fma2(both(kSeries<4> * (i4 * i2)), v, both(kSeries<3> * (i4 * i1)));
    series = fma2(series, v, both(kSeries<2> * i4));
    series = fma2(series, v, both(kSeries<1> * i3));
    series = fma2(series, v, both(kSeries<0> * i2));
  }
  series = q * (v * fma2(series, v, both(i1)));
  const F2 apart = fma2(p, both(f.p.weight * f.forward), both(0.f) - q);
  return choose_near(v, (kFine ? 0.5f : 0x1p-6f) * f.t, series, apart);
}

FUSEDKL_DEVICE float bounded(float v) { return v != v ? v : fminf(fmaxf(v, -FLT_MAX), FLT_MAX); }

// Everything of RowGradient for one token.
template <DType X, DType Y>
FUSEDKL_DEVICE void general_token(const GradientFrame& f, float x, float y, float& gx, float& gy) {
  const bool has_x = x != -INFINITY, has_y = y != -INFINITY, has_both = has_x && has_y;
  auto about = [&](const GradientFrame::TwoFloats& c) {
    const float v = bounded(difference<X, Y>({x, x}, {y, y}, c).x * f.inv_t);
    return has_both ? v : 0.f;
  };
  const float q = exp2_fast(fmaf(y, f.slope, -f.q.shift)) * f.q.weight, l = about(f.ratio);
  const float own = exp2_fast(fmaf(x, f.slope, -f.p.shift)) * f.p.weight;
  float s = fmaf(kSeries<4>, l, kSeries<3>);
  s = fmaf(s, l, kSeries<2>);
  s = fmaf(s, l, kSeries<1>);
  s = fmaf(s, l, kSeries<0>);
  const bool near = has_both && fabsf(l) <= 0.5f;
  const float moved = near ? q * (l * fmaf(s, l, 1.f)) : own - q, p = near ? q + moved : own;  // p - q without cancelling
  const float log_p = bounded((x - f.max_x) * f.inv_t - f.log_sum_x) + f.entropy;
  gx = fmaf(f.forward, moved, p * about(f.above_p) * f.reverse);
  gx = fmaf(p * (has_x ? log_p : 0.f), f.information, fmaf(p, f.mass, gx));
  gx = has_x ? gx + f.uniform : has_y ? f.forward * moved : 0.f;
  const float log_q = bounded((y - f.max_y) * f.inv_t - f.log_sum_y) + f.ref_entropy;
  gy = fmaf(f.ref_reverse, moved, q * about(f.above_q) * f.ref_forward);
  gy = fmaf(q * (has_y ? log_q : 0.f), f.ref_information, fmaf(q, f.ref_mass, gy));
}

// Calls body(x, y, first element, how many) for the chunks and the ragged elements of a view.
template <DType X, DType Y, class View, class Body>
FUSEDKL_DEVICE void for_each_chunk(const View& view, const Body& body) {
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
#pragma unroll 1
  for (int i = first; i < view.chunks; i += step) body(view.policy(i), view.reference(i), view.head + i * kChunk, kChunk);
#pragma unroll 1
  for (int i = first; i < view.ragged(); i += step) {
    Chunk<X> x{};
    Chunk<Y> y{};
    const int at = view.ragged_index(i);
    set_pair(x, 0, {static_cast<float>(load_one<X>(view.x, at)), 0.f});
    set_pair(y, 0, {static_cast<float>(load_one<Y>(view.y, at)), 0.f});
    body(x, y, at, 1);
  }
}

// SHARED: to an address that may be one of shared memory
template <DType D, bool SHARED = false>
FUSEDKL_DEVICE void store_chunk(char* base, int at, const Chunk<D>& c, int count) {
  char* const to = base + static_cast<int64_t>(at) * kSizeOf<D>;
  if (count == kChunk && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
    for (int j = 0; j < kWordsOf<D> / 4; j++) {
      uint4 v;
      memcpy(&v, &c.word[4 * j], 16);
      if constexpr (SHARED) reinterpret_cast<uint4*>(to)[j] = v;
      else __stcs(reinterpret_cast<uint4*>(to) + j, v);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; i++) {
    if (i >= count) break;
    if constexpr (D == DType::f32) reinterpret_cast<uint32_t*>(to)[i] = c.word[i];
    else reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(c.word[i / 2] >> (i % 2 * 16));
  }
}

// The sweep itself; PLAIN: the policy's gradient of forward KL alone.
template <bool PLAIN, DType X, DType Y, class View>
FUSEDKL_DEVICE void write_gradients(const GradientFrame& f, const View& view, char* gx, char* gy) {
  for_each_chunk<X, Y>(view, [&](const Chunk<X>& cx, const Chunk<Y>& cy, int at, int count) {
    Chunk<X> ox;
    Chunk<Y> oy;
#pragma unroll
    for (int i = 0; i < kChunk / 2; i++) {
      const F2 x = pair_of(cx, i), y = pair_of(cy, i);
      if constexpr (PLAIN) {
        set_pair(ox, i, forward_pair<X, Y>(f, x, y));
      } else {
        F2 vx, vy;
        general_token<X, Y>(f, x.x, y.x, vx.x, vy.x);
        general_token<X, Y>(f, x.y, y.y, vx.y, vy.y);
        set_pair(ox, i, vx);
        set_pair(oy, i, vy);
      }
    }
    if (PLAIN || gx) store_chunk<X, View::kShared>(gx, at, ox, count);
    if (!PLAIN && gy) store_chunk<Y, View::kShared>(gy, at, oy, count);
  });
}

// [begin, end) of a row's gradient set to one number
FUSEDKL_DEVICE void fill(char* row, DType d, int64_t begin, int64_t end, float v) {
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x); i < end; i += static_cast<int64_t>(blockDim.x))
    store_any(row, d, i, v);
}

// The gradients that are there for tokens of a stretch, over what the sweep stored.
FUSEDKL_DEVICE void store_tokens(const GradientArgs& a, int64_t r, const double* tokens, char* to, DType d, int64_t begin,
                                 int64_t end) {
  if (!tokens) return;
  for (int64_t k = static_cast<int64_t>(threadIdx.x); k < a.ids_per_row; k += static_cast<int64_t>(blockDim.x)) {
    const int64_t at = r * a.ids_per_row + k, id = a.ids[at];
    if (id >= begin && id < end && tokens[at] == tokens[at]) store_any(to, d, id, tokens[at]);
  }
}

// PLAIN: the policy's gradient of forward KL alone. Blocks share a row; what a block reads it reads before it writes there.
template <bool PLAIN, DType X, DType Y, bool SHIFTED>
__global__ void __launch_bounds__(kGradientThreads, (PLAIN ? 4 : kGeneralBlocks<X, Y>)) gradient_kernel(GradientArgs a) {
  const int64_t pieces = a.in.pieces(), r = blockIdx.x / pieces, begin = blockIdx.x % pieces * kPiece;
  const bool last = begin + kPiece >= a.in.length;
  const int64_t end = last ? a.in.length : begin + kPiece;
  const GradientFrame& frame = a.frames[r];
  char* const gx = a.gx.data ? a.gx.row(r) : nullptr;
  char* const gy = !PLAIN && a.gy.data ? a.gy.row(r) : nullptr;
  // logits that do not exist
  if (last && gx) fill(gx, X, end, a.total_x, 0);
  if (last && gy) fill(gy, Y, end, a.total_y, 0);
  if (frame.fate == kExact) return;
  const bool sweep_x = gx && frame.policy, sweep_y = gy && frame.reference;
  if (gx && !sweep_x) fill(gx, X, begin, end, frame.fill_policy);
  if (gy && !sweep_y) fill(gy, Y, begin, end, frame.fill_reference);
  if ((!sweep_x && !sweep_y) || frame.fate != kSweep) return;
  const GradientFrame f = frame;
  const SegmentView<X, Y, SHIFTED> view(a.in.x.row(r) + begin * kSizeOf<X>, a.in.y.row(r) + begin * kSizeOf<Y>,
                                        static_cast<int>(end - begin));
  write_gradients<PLAIN, X, Y>(f, view, sweep_x ? gx + begin * kSizeOf<X> : nullptr, sweep_y ? gy + begin * kSizeOf<Y> : nullptr);
  if (PLAIN || (!a.tokens && !a.ref_tokens)) return;
  __syncthreads();
  if (sweep_x) store_tokens(a, r, a.tokens, gx, X, begin, end);
  if (sweep_y) store_tokens(a, r, a.ref_tokens, gy, Y, begin, end);
}

template <DType X, DType Y>
bool launch_gradient(const GradientArgs& a, bool plain, bool shifted, Stream stream) {
  const int64_t blocks = a.in.rows * (a.in.pieces());
  if constexpr (X == Y) {
    if (plain && !shifted) return launch(gradient_kernel<true, X, Y, false>, blocks, kGradientThreads, stream, a);
    if (plain) return launch(gradient_kernel<true, X, Y, true>, blocks, kGradientThreads, stream, a);
  }
  return launch(gradient_kernel<false, X, Y, true>, blocks, kGradientThreads, stream, a);
}

}  // namespace gpu
}  // namespace fusedkl
