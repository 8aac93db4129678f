// A row as K given tokens and all others together; the formulas stand in topk_math.h. A segment's given tokens are bits in shared
// memory, so that the one sweep leaves them out without looking them up.
#pragma once
#include "../topk_math.h"
#include "family.cuh"

namespace fusedkl {
namespace gpu {

constexpr int kTopkThreads = 256;
constexpr int kLongestSegment = 65536;

// Sets the bits of the given tokens of [begin, end); whether one is given twice, or lies beyond the row. Ends with a barrier.
FUSEDKL_DEVICE bool mark_given(const TopkArgs& a, int64_t r, int64_t begin, int64_t end, unsigned* given, double* room) {
  for (int i = static_cast<int>(threadIdx.x); i < kLongestSegment / 32; i += static_cast<int>(blockDim.x)) given[i] = 0;
  __syncthreads();
  double bad = 0;
  for (int64_t k = static_cast<int64_t>(threadIdx.x); k < a.per_row; k += static_cast<int64_t>(blockDim.x)) {
    const int64_t id = a.ids[r * a.per_row + k];
    if (id >= a.in.length) bad = 1;
    if (id < begin || id >= end) continue;
    const int at = static_cast<int>(id - begin);
    if (atomicOr(given + at / 32, 1u << at % 32) >> at % 32 & 1) bad = 1;
  }
  return block_max(bad, room) != 0;
}
FUSEDKL_DEVICE bool is_given(const unsigned* given, int i) { return given[i / 32] >> i % 32 & 1; }

// Sum of e^((x - top)/T) over the tokens that this thread has seen.
struct LaneMass {
  float top = -INFINITY, sum = 0;

  // the largest of x, NaN ignored; what NaN and +inf do to the sum is NaN
  FUSEDKL_DEVICE void raise(float highest, float slope) {
    if (!(highest > top)) return;
    sum = top > -INFINITY ? sum * exp2_fast((top - highest) * slope) : sum;
    top = highest;
  }
  FUSEDKL_DEVICE void add(float x, float slope) {
    if (x != -INFINITY) sum += exp2_fast((x - top) * slope);
  }
};

template <class Rows>
FUSEDKL_DEVICE LaneMass lane_mass(const Rows& rows, const unsigned* given, float slope) {
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x), chunks = rows.length / kChunk;
  LaneMass m;
#pragma unroll 1
  for (int i = first; i < chunks; i += step) {
    F2 x[kChunk / 2];
    rows.policy(i, x);
    const unsigned bits = given[i / 4] >> i % 4 * kChunk;
    float highest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) {
      if (bits >> 2 * j & 1) x[j].x = -INFINITY;
      if (bits >> (2 * j + 1) & 1) x[j].y = -INFINITY;
      highest = fmaxf(highest, fmaxf(x[j].x, x[j].y));
    }
    m.raise(highest, slope);
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) m.add(x[j].x, slope), m.add(x[j].y, slope);
  }
#pragma unroll 1
  for (int i = chunks * kChunk + first; i < rows.length; i += step) {
    if (is_given(given, i)) continue;
    float x, unused;
    rows.one(i, x, unused);
    m.raise(x, slope);
    m.add(x, slope);
  }
  return m;
}

FUSEDKL_DEVICE RowState mass_state(double max, double total, double inv_t) {
  RowState s{};
  s.policy_max = total > 0 ? max * inv_t : 0;
  s.policy_log_sum = total > 0 ? log(total) : -INFINITY;
  if (total != total) s = nan_state();
  return s;
}

// One block per segment: the mass of what was not given, as the policy's side of a RowState.
template <class Rows>
__global__ void __launch_bounds__(kTopkThreads, 2) topk_sums_kernel(TopkArgs a) {
  __shared__ unsigned given[kLongestSegment / 32];
  __shared__ double room[kTopkThreads / kWarp];
  const int segment = static_cast<int>(blockIdx.x % a.in.cut.count);
  const int64_t r = blockIdx.x / a.in.cut.count, begin = a.in.begin(segment);
  if (!a.in.counted(r)) return;
  const int length = a.in.length_of(segment);
  const double inv_t = a.in.inv_t(r);
  const bool bad = mark_given(a, r, begin, begin + length, given, room);
  double max = -INFINITY, total = 0;
  bool exact = a.in.exact() || !(inv_t < 2e3 && inv_t > 5e-4);
  if (!exact) {
    const float slope = static_cast<float>(kLog2e * inv_t);
    const LaneMass own = lane_mass(Rows::of(a.in, r, begin, length), given, slope);
    max = block_max(own.top, room);
    exact = !(max <= 1e37);
    const double lifted = own.top > -INFINITY ? own.sum * exp2((static_cast<double>(own.top) - max) * slope) : own.sum;
    total = block_sum(lifted, room);
  }
  if (exact) {
    const ExactRows rows = exact_rows(a.in, r, begin);
    const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
    double own = 0, top = -INFINITY, invalid = 0;
    for (int i = first; i < length; i += step) {
      const double x = rows.policy(i);
      if (is_given(given, i)) continue;
      if (!(x < INFINITY)) invalid = 1;
      top = x > top ? x : top;
    }
    max = block_max(top, room);
    for (int i = first; i < length; i += step)
      if (!is_given(given, i) && rows.policy(i) > -INFINITY) own += exp((rows.policy(i) - max) * inv_t);
    total = block_max(invalid, room) != 0 ? NAN : block_sum(own, room);
  }
  if (threadIdx.x == 0) a.parts[blockIdx.x] = bad ? nan_state() : mass_state(max, total, inv_t);
}

// One block per row: the rest of it, then the given tokens' share, which may be nearly all.
static __global__ void __launch_bounds__(kFinishThreads, 2) topk_finish_kernel(TopkArgs a) {
  __shared__ double room[kFinishWarps];
  const int64_t r = blockIdx.x, columns = a.per_row + 1;
  const int64_t first = static_cast<int64_t>(threadIdx.x), step = static_cast<int64_t>(blockDim.x);
  double* const out = a.values + r * columns;
  const ExactRows rows = exact_rows(a.in, r);
  const double inv_t = a.in.inv_t(r);
  TopkState s{};
  const bool counted = a.in.counted(r);
  if (counted) {
    const RowState* const parts = a.parts + r * a.in.cut.count;
    int heaviest;
    const double more = merged_log_sum(parts, a.in.cut.count, true, &heaviest);
    bool bad = false;
    for (int i = 0; i < a.in.cut.count; i++) bad |= parts[i].policy_log_sum != parts[i].policy_log_sum;
    s.rest_max = bad ? NAN : parts[heaviest].policy_max;
    s.rest_log_sum = bad ? NAN : parts[heaviest].policy_log_sum + more;
    const double rest = s.rest_max + s.rest_log_sum;
    double top = rest, invalid = bad;
    auto token = [&](int64_t k) {  // 1/T times the logit; -inf where there is none
      const int64_t id = a.ids[r * a.per_row + k];
      return id >= 0 && id < a.in.length ? rows.policy(id) * inv_t : -INFINITY;
    };
    for (int64_t k = first; k < a.per_row; k += step) {
      const double v = token(k);
      if (!(v < INFINITY)) invalid = 1;
      top = v > top ? v : top;
    }
    top = block_max(top, room);
    EntropySums about;  // its ties and the rest, about the heaviest outcome
    for (int64_t k = first; k < a.per_row && top > -INFINITY; k += step) about.add(top - token(k));
    if (first == 0 && top > -INFINITY) about.add(top - rest);
    const double ties = block_sum(about.ties, room), others = block_sum(about.rest, room);
    const bool rest_on_top = top == rest;
    s.policy_max = top > -INFINITY ? (rest_on_top ? s.rest_max : top) : 0;
    s.policy_log_sum = top > -INFINITY ? (rest_on_top ? s.rest_log_sum : 0) + log_mass(ties, others) : -INFINITY;
    if (block_max(invalid, room) != 0) s.policy_max = s.policy_log_sum = s.rest_max = s.rest_log_sum = NAN;
  }
  for (int64_t k = first; k < a.per_row; k += step) {
    const int64_t id = a.ids[r * a.per_row + k];
    const bool here = counted && id >= 0;
    out[k] = here ? id < a.in.length ? s.logprob(rows.policy(id) * inv_t) : NAN : 0;
  }
  if (first != 0) return;
  out[a.per_row] = counted ? s.rest_logprob() : 0;
  a.state[r] = s;
}

// The gradient of a stretch of a row: one read, one write, then the given tokens' own over it.
template <class Rows>
__global__ void __launch_bounds__(kTopkThreads, 2) topk_gradient_kernel(TopkArgs a) {
  __shared__ double room[kTopkThreads / kWarp];
  const int64_t pieces = a.in.pieces(), r = blockIdx.x / pieces, begin = blockIdx.x % pieces * kPiece;
  const int64_t end = begin + kPiece < a.in.length ? begin + kPiece : a.in.length;
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  const double* const grad = a.grad + r * (a.per_row + 1);
  char* const row = a.gx.row(r);
  double tokens = 0, any = grad[a.per_row] != 0;
  for (int64_t k = first; k < a.per_row; k += step) tokens += grad[k], any += grad[k] != 0;
  tokens = block_sum(tokens, room);
  if (block_sum(any, room) == 0) {  // exactly 0, and not read: the row may hold anything
    fill(row, a.in.dx, begin, end, 0);
    return;
  }
  const TopkState s = a.state[r];
  if (!(s.policy_log_sum > -INFINITY)) {  // no mass anywhere is no distribution
    fill(row, a.in.dx, begin, end, NAN);
    return;
  }
  const double inv_t = a.in.inv_t(r);
  const TopkGradient g(s, inv_t, tokens, grad[a.per_row]);
  const ExactRows exact = exact_rows(a.in, r);
  const int length = static_cast<int>(end - begin);
  const bool in_float = !a.in.exact() && inv_t < 2e3 && inv_t > 5e-4 && fabs(s.rest_max) <= 1e37;
  if (g.rest == 0) {
    fill(row, a.in.dx, begin, end, 0);
  } else if (!in_float) {
    for (int64_t i = begin + first; i < end; i += step) {
      const double x = exact.policy(i);
      store_any(row, a.in.dx, i, x == -INFINITY ? 0 : g.rest * exp((x * inv_t - s.rest_max) - s.rest_log_sum));
    }
  } else {
    const Rows rows = Rows::of(a.in, r, begin, length);
    const float slope = static_cast<float>(kLog2e * inv_t);
    const GradientFrame::Weigh weigh = weigh_of(s.rest_max, s.rest_log_sum, 1 / inv_t, slope);
    const float coefficient = static_cast<float>(g.rest * weigh.weight);
    char* const to = row + begin * bytes_of(a.in.dx);
    const int chunks = length / kChunk;
    auto at = [&](float x) { return coefficient * exp2_fast(fmaf(x, slope, -weigh.shift)); };
#pragma unroll 1
    for (int i = first; i < chunks; i += step) {
      F2 x[kChunk / 2];
      rows.policy(i, x);
#pragma unroll
      for (int j = 0; j < kChunk / 2; j++) x[j] = {at(x[j].x), at(x[j].y)};
      rows.store(to, true, i * kChunk, x, kChunk);
    }
#pragma unroll 1
    for (int i = chunks * kChunk + first; i < length; i += step) {
      float x, unused;
      rows.one(i, x, unused);
      const F2 v[kChunk / 2] = {{at(x), 0.f}};
      rows.store(to, true, i, v, 1);
    }
  }
  __syncthreads();
  for (int64_t k = first; k < a.per_row; k += step) {
    const int64_t id = a.ids[r * a.per_row + k];
    if (id >= begin && id < end) store_any(row, a.in.dx, id, g.given(grad[k], s.logprob(exact.policy(id) * inv_t)));
  }
}

}  // namespace gpu
}  // namespace fusedkl
