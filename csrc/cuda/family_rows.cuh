// The second sweep in launches of its own: one block per piece of a row reads both logits again, from memory or from what the
// second-level cache has kept; one block per row then makes its value. Where a cluster holds the row, see family_cluster.cuh.
#pragma once
#include "family.cuh"

namespace fusedkl {
namespace gpu {

// Whether the next sweep has to do with a row.
FUSEDKL_DEVICE bool family_wants(const FamilyArgs& a, int64_t r) {
  if (!a.in.counted(r) || (a.valued && a.valued[r])) return false;
  return a.sweep == 0 ? a.sums || is_finite(a.state[r].residual) : a.again[r];
}
FUSEDKL_DEVICE bool family_in_float(const FamilyArgs& a, int64_t r) {
  return !a.in.exact() && !a.kind.exact.kind.is_delicate() && !beyond_sweeps(a.in, a.state[r], a.in.inv_t(r));
}

template <Family F, class Rows>
__global__ void __launch_bounds__(kFamilyThreads, 2) family_sums_kernel(FamilyArgs a) {
  __shared__ double room[kFamilyThreads / kWarp];
  __shared__ __align__(8) unsigned char storage[sizeof(GradientFrame)];
  const int64_t pieces = a.in.pieces(), r = blockIdx.x / pieces, begin = blockIdx.x % pieces * kPiece;
  if (!family_wants(a, r) || !family_in_float(a, r)) return;
  GradientFrame* const frame = reinterpret_cast<GradientFrame*>(storage);
  if (threadIdx.x == 0) *frame = frame_of(RowPlan{}, a.state[r], a.in.inv_t(r));
  __syncthreads();
  const int64_t left = a.in.length - begin;
  const Rows rows = Rows::of(a.in, r, begin, static_cast<int>(left < kPiece ? left : kPiece));
  const FamilySums sums = family_block_sums<F>(a.kind, *frame, rows, may_want_mending(a.state[r]), room);
  if (threadIdx.x == 0) a.parts[blockIdx.x] = sums;
}

// What the first launch of a backward, and the sweep of the rows without a family, have left.
template <Family F, class Rows>
__global__ void __launch_bounds__(kFamilyThreads, 2) family_gradient_kernel(GradientArgs a) {
  const int64_t pieces = a.in.pieces(), r = blockIdx.x / pieces, begin = blockIdx.x % pieces * kPiece;
  if (a.frames[r].fate != kFamily) return;
  const GradientFrame f = a.frames[r];
  const int64_t end = begin + kPiece < a.in.length ? begin + kPiece : a.in.length;
  char* const gx = a.gx.data && f.policy ? a.gx.row(r) : nullptr;
  char* const gy = a.gy.data && f.reference ? a.gy.row(r) : nullptr;
  if (!gx && !gy) return;
  family_gradients<F>(a.kind, f, Rows::of(a.in, r, begin, static_cast<int>(end - begin)),
                      gx ? gx + begin * bytes_of(a.in.dx) : nullptr, gy ? gy + begin * bytes_of(a.in.dy) : nullptr);
  if (!a.tokens && !a.ref_tokens) return;
  __syncthreads();
  if (gx) store_tokens(a, r, a.tokens, gx, a.in.dx, begin, end);
  if (gy) store_tokens(a, r, a.ref_tokens, gy, a.in.dy, begin, end);
}

template <class Rows>
bool run_family_sums(const FamilyArgs& a, Stream stream) {
  const int64_t blocks = a.in.rows * (a.in.pieces());
  auto run = [&](auto kernel) { return launch(kernel, blocks, kFamilyThreads, stream, a); };
  return family_switch(a.kind.exact.kind, [&](auto f) { return run(family_sums_kernel<decltype(f)::value, Rows>); });
}
template <class Rows>
bool run_family_gradient(const GradientArgs& a, Stream stream) {
  const int64_t blocks = a.in.rows * (a.in.pieces());
  auto run = [&](auto kernel) { return launch(kernel, blocks, kFamilyThreads, stream, a); };
  return family_switch(a.kind.exact.kind, [&](auto f) { return run(family_gradient_kernel<decltype(f)::value, Rows>); });
}

}  // namespace gpu
}  // namespace fusedkl
