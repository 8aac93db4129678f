// The second sweep, for a divergence that needs both normalisers before its first term, and its gradient. The formulas stand in
// family_terms.h; where every logit of a warp's chunks is near its partner, polynomials for them serve, and where none is far
// from it, mixture.cuh.
#pragma once
#include "mixture.cuh"
#include "prepare.cuh"

namespace fusedkl {
namespace gpu {

FUSEDKL_MEMBER Real FloatOps::exp2_of(Real u) { return {exp2_fast(u.v)}; }
FUSEDKL_MEMBER Decay<FloatOps> FloatOps::decay(Real u) {
  const Real left = exp2_of({u.v * static_cast<float>(-kLog2e)});
  return {u.v <= static_cast<float>(kLeast) ? Real{-INFINITY} : one_minus_exp(u), left};
}

// h(z) = z - log1p(z): near 0 by s = z / (2 + z), where log1p(z) = 2 atanh(s) and z - 2s = z s
FUSEDKL_MEMBER Real FloatOps::h(Real z) {
  const float s = (z / Real{z.v + 2.f}).v, s2 = s * s;
  float tail = fmaf(2.f / 11, s2, 2.f / 9);
  tail = fmaf(tail, s2, 2.f / 7);
  tail = fmaf(tail, s2, 2.f / 5);
  tail = fmaf(tail, s2, 2.f / 3);
  const float near = fmaf(z.v, s, -(s * s2) * tail), far = z.v - static_cast<float>(kLn2) * log2_fast(1.f + z.v);
  return {fabsf(z.v) <= 0.41f ? near : far};
}

constexpr int kFamilyThreads = 256;

// A row's l = log(p/q) in units of 1/scale nats.
struct LogRatio {
  F2 high, low, slope, rest;
  FUSEDKL_DEVICE LogRatio(const GradientFrame& f, float scale)
      : high(both(f.ratio.high)),
        low(both(f.ratio.low)),
        slope(both(f.inv_t * scale)),
        rest(both(-f.ratio.low * (f.inv_t * scale))) {}
  template <DType X, DType Y>
  FUSEDKL_DEVICE F2 at(F2 x, F2 y) const {
    const F2 v = centred<X, Y>(x, y, high, low);
    if constexpr (kExactDifference<X, Y>) return v * slope;
    return fma2(v, slope, rest);  // 16-bit logits have one float of centre in the forward, and two here
  }
};

// A stretch of two rows of one dtype on 16-byte boundaries, in global or in shared memory.
template <DType D, bool SHARED>
struct VectorRows {
  const char *x, *y;
  int length;

  FUSEDKL_DEVICE static VectorRows of(const Inputs& in, int64_t r, int64_t begin, int length) {
    return {in.x.row(r) + begin * kSizeOf<D>, in.y.row(r) + begin * kSizeOf<D>, length};
  }
  FUSEDKL_DEVICE void fetch(int i, F2 (&a)[kChunk / 2], F2 (&b)[kChunk / 2]) const {
    const Chunk<D> cx = aligned_chunk<D, SHARED>(x, i), cy = aligned_chunk<D, SHARED>(y, i);
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) a[j] = pair_of(cx, j), b[j] = pair_of(cy, j);
  }
  FUSEDKL_DEVICE void policy(int i, F2 (&a)[kChunk / 2]) const {
    const Chunk<D> c = aligned_chunk<D, SHARED>(x, i);
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) a[j] = pair_of(c, j);
  }
  FUSEDKL_DEVICE void one(int i, float& a, float& b) const {
    a = static_cast<float>(load_one<D>(x, i));
    b = static_cast<float>(load_one<D>(y, i));
  }
  FUSEDKL_DEVICE F2 log_ratio(F2 a, F2 b, const LogRatio& of) const { return of.at<D, D>(a, b); }
  FUSEDKL_DEVICE void store(char* row, bool, int at, const F2 (&v)[kChunk / 2], int count) const {
    Chunk<D> c;
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) set_pair(c, j, v[j]);
    store_chunk<D, SHARED>(row, at, c, count);
  }
};

// Of any two dtypes at any alignment, element by element: the same numbers in the same order.
struct AnyRows {
  const char *x, *y;
  int length;
  DType dx, dy;

  FUSEDKL_DEVICE static AnyRows of(const Inputs& in, int64_t r, int64_t begin, int length) {
    return {in.x.row(r) + begin * bytes_of(in.dx), in.y.row(r) + begin * bytes_of(in.dy), length, in.dx, in.dy};
  }
  FUSEDKL_DEVICE static float load(const char* row, DType d, int64_t i) {
    if (d == DType::f32) return reinterpret_cast<const float*>(row)[i];
    return static_cast<float>(d == DType::bf16 ? load_one<DType::bf16>(row, i) : load_one<DType::f16>(row, i));
  }
  FUSEDKL_DEVICE static void chunk(const char* row, DType d, int i, F2 (&v)[kChunk / 2]) {
    const int64_t at = static_cast<int64_t>(i) * kChunk;
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) v[j] = {load(row, d, at + 2 * j), load(row, d, at + 2 * j + 1)};
  }
  FUSEDKL_DEVICE void policy(int i, F2 (&a)[kChunk / 2]) const { chunk(x, dx, i, a); }
  FUSEDKL_DEVICE void fetch(int i, F2 (&a)[kChunk / 2], F2 (&b)[kChunk / 2]) const {
    chunk(x, dx, i, a);
    chunk(y, dy, i, b);
  }
  FUSEDKL_DEVICE void one(int i, float& a, float& b) const { a = load(x, dx, i), b = load(y, dy, i); }
  FUSEDKL_DEVICE F2 log_ratio(F2 a, F2 b, const LogRatio& of) const {
    const bool exact = dx == DType::f32 || dy == DType::f32;
    return exact ? of.at<DType::f32, DType::f32>(a, b) : of.at<DType::bf16, DType::bf16>(a, b);
  }
  FUSEDKL_DEVICE void store(char* row, bool policy, int at, const F2 (&v)[kChunk / 2], int count) const {
#pragma unroll
    for (int j = 0; j < kChunk; j++)
      if (j < count) store_any(row, policy ? dx : dy, at + j, j % 2 ? v[j / 2].y : v[j / 2].x);
  }
};

// `l` is of a token that both rows have
template <Family F>
FUSEDKL_DEVICE FamilyToken<FloatOps> family_token(const GradientFrame& f, float x, float y, float l) {
  const bool no_x = x == -INFINITY, no_y = y == -INFINITY;
  const float far = static_cast<float>(farthest(F));
  l = no_x ? (no_y ? 0.f : -far) : no_y ? far : l;
  const float v = fminf(far, fabsf(l));
  const bool policy_big = l > 0;
  const float exponent = fmaf(policy_big ? x : y, f.slope, -(policy_big ? f.p.shift : f.q.shift));
  const float weight = policy_big ? f.p.weight : f.q.weight;
  return {policy_big,
          Real{policy_big ? v : -v},
          Real{v},
          FloatOps::one_minus_exp(Real{v}),
          FloatOps::exp2_of({v * static_cast<float>(-kLog2e)}),
          Real{exp2_fast(exponent) * weight},
          Real{exponent},
          Real{weight}};
}

struct LaneFamily {
  float value = 0, policy = 0, reference = 0, above = 0, below = 0;
  F2 value_by_q{}, slope_by_q{}, apart_by_q{},
      excess_by_q{};  // of terms per unit of q, without its weight; the first two in units of ChunkFamily
};

// One thread's share of a stretch. MEND: with the sums of p - q, which tell whether the log-ratio is good enough.
template <Family F, bool MEND, class Rows>
FUSEDKL_DEVICE void family_sweep(const FamilyParameters& k, const GradientFrame& f, const Rows& rows, LaneFamily& s) {
  constexpr bool kNear = F != Family::tvd && !MEND;
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  const int chunks = rows.length / kChunk / kWarp * kWarp;  // a warp votes how to take its 32, so none is idle
  const LogRatio ratio(f, static_cast<float>(kLog2e));
  const ChunkFamily& c = k.chunk;
  const F2 slope = both(f.slope), minus_shift = both(-f.q.shift);
  auto add = [&](float x, float y, float l) {
    const FamilyToken<FloatOps> t = family_token<F>(f, x, y, static_cast<float>(kLn2) * l);
    const auto terms = family_terms<F, FloatOps>(k.fast, t);
    s.value += terms.value.v;
    s.policy += terms.policy.v;
    s.reference += terms.reference.v;
    if constexpr (F == Family::tvd || MEND) {
      const float apart = t.big.v * t.d.v;
      s.above += t.policy_big ? apart : 0.f;
      s.below += t.policy_big ? 0.f : apart;
    }
  };
#pragma unroll 1
  for (int i = first; i < chunks; i += step) {
    F2 x[kChunk / 2], y[kChunk / 2], l[kChunk / 2];
    rows.fetch(i, x, y);
    float furthest = 0;  // NaN where a token is absent from both rows
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) {
      l[j] = rows.log_ratio(x[j], y[j], ratio);
      furthest = max_magnitude(max_magnitude(furthest, l[j].x), l[j].y);
    }
    auto q_of = [&](int j) { return exp2_fast(fma2(y[j], slope, minus_shift)); };
    if (kNear && !__any_sync(kAllLanes, !(furthest <= c.near))) {
#pragma unroll
      for (int j = 0; j < kChunk / 2; j++) {
        const F2 q = q_of(j), ql2 = q * (l[j] * l[j]);
        s.value_by_q = fma2(ql2, series_at<2>(c.series.first, l[j]), s.value_by_q);
        if constexpr (F == Family::mixture) s.slope_by_q = fma2(ql2, series_at<2>(c.series.second, l[j]), s.slope_by_q);
        else s.slope_by_q = fma2(q, series_at<0>(c.series.second, l[j]), s.slope_by_q);
      }
      continue;
    }
    if constexpr (F == Family::mixture) {
      if (c.direct && !__any_sync(kAllLanes, !(furthest <= kDirectReach))) {
        auto take = [&](auto two_sided) {
#pragma unroll
          for (int j = 0; j < kChunk / 2; j++) {
            const F2 q = q_of(j);
            const DirectTerms t = direct_terms<decltype(two_sided)::value, MEND>(c, l[j]);
            s.value_by_q = fma2(q, t.value, s.value_by_q);
            s.slope_by_q = fma2(q, t.slope, s.slope_by_q);
            if constexpr (MEND) {
              s.apart_by_q = fma2(q, absolute(t.moved), s.apart_by_q);
              s.excess_by_q = fma2(q, t.moved, s.excess_by_q);
            }
          }
        };
        if (k.fast.two_sided) take(std::true_type());
        else take(std::false_type());
        continue;
      }
    }
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) {
      add(x[j].x, y[j].x, l[j].x);
      add(x[j].y, y[j].y, l[j].y);
    }
  }
#pragma unroll 1
  for (int i = chunks * kChunk + first; i < rows.length; i += step) {
    float x, y;
    rows.one(i, x, y);
    add(x, y, rows.log_ratio({x, x}, {y, y}, ratio).x);
  }
}

// Of a whole block, the same in every thread. mend: may_want_mending of the row.
template <Family F, class Rows>
FUSEDKL_DEVICE FamilySums family_block_sums(const FamilyParameters& k, const GradientFrame& f, const Rows& rows, bool mend,
                                            double* room) {
  LaneFamily s;
  if (mend) family_sweep<F, true>(k, f, rows, s);
  else family_sweep<F, false>(k, f, rows, s);
  const double weight = f.q.weight, unit = weight * k.chunk.unit, apart = weight * fold(s.apart_by_q);
  const double value = unit * fold(s.value_by_q), slope = unit * fold(s.slope_by_q), excess = weight * fold(s.excess_by_q);
  FamilySums out;
  out.value = block_sum(s.value + value, room);
  out.policy_slope = block_sum(s.policy + slope, room);
  // of mixture, the slopes' means add up to the value
  out.reference_slope = block_sum(s.reference + (F == Family::mixture ? value - slope : 0), room);
  const double above = block_sum(s.above, room), below = block_sum(s.below, room);
  out.apart = above + below + block_sum(apart, room);
  out.excess = above - below + block_sum(excess, room);
  return out;
}

// The gradients of a stretch of a row; one that is not wanted is null.
template <Family F, class Rows>
FUSEDKL_DEVICE void family_gradients(const FamilyParameters& k, const GradientFrame& f, const Rows& rows, char* gx, char* gy) {
  const int first = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x), chunks = rows.length / kChunk;
  const LogRatio ratio(f, 1);
  auto at = [&](float x, float y, float l, float& to_x, float& to_y) {
    const FamilyToken<FloatOps> t = family_token<F>(f, x, y, l);
    const auto g =
        family_gradient_terms<F, FloatOps>(k.fast, t, Real{f.policy_mean}, Real{f.reference_mean}, Real{f.divergence_value});
    const float alone = x == -INFINITY ? 0.f : fmaf(t.p().v, f.mass, f.uniform);
    to_x = fmaf(f.divergence, g.policy.v, alone);
    to_y = f.ref_divergence * g.reference.v;
  };
#pragma unroll 1
  for (int i = first; i < chunks; i += step) {
    F2 x[kChunk / 2], y[kChunk / 2];
    rows.fetch(i, x, y);
#pragma unroll
    for (int j = 0; j < kChunk / 2; j++) {
      const F2 l = rows.log_ratio(x[j], y[j], ratio);
      F2 to_x, to_y;
      at(x[j].x, y[j].x, l.x, to_x.x, to_y.x);
      at(x[j].y, y[j].y, l.y, to_x.y, to_y.y);
      x[j] = to_x;
      y[j] = to_y;
    }
    if (gx) rows.store(gx, true, i * kChunk, x, kChunk);
    if (gy) rows.store(gy, false, i * kChunk, y, kChunk);
  }
#pragma unroll 1
  for (int i = chunks * kChunk + first; i < rows.length; i += step) {
    F2 x[kChunk / 2]{}, y[kChunk / 2]{};
    rows.one(i, x[0].x, y[0].x);
    const float l = rows.log_ratio({x[0].x, x[0].x}, {y[0].x, y[0].x}, ratio).x;
    at(x[0].x, y[0].x, l, x[0].x, y[0].x);
    if (gx) rows.store(gx, true, i, x, 1);
    if (gy) rows.store(gy, false, i, y, 1);
  }
}

// In a peaked row a slope less its mean is a small rest of both: what their own sum is off 0 belongs to the means.
FUSEDKL_DEVICE bool refines_slopes(const GradientArgs& a, const RowState& s) {
  return (a.in.dx == DType::f32 || a.in.dy == DType::f32) && s.whole != 0 && is_peaked(s) &&
         a.kind.exact.kind.family == Family::mixture;
}
FUSEDKL_DEVICE void refine_slopes(const GradientArgs& a, int64_t r, const GradientFrame& f, RowState& s, double* room) {
  const AnyRows rows = AnyRows::of(a.in, r, 0, static_cast<int>(a.in.length));
  const LogRatio ratio(f, 1);
  double policy = 0, reference = 0;
  for (int i = static_cast<int>(threadIdx.x); i < rows.length; i += static_cast<int>(blockDim.x)) {
    float x, y;
    rows.one(i, x, y);
    const float l = rows.log_ratio({x, x}, {y, y}, ratio).x;
    const auto g =
        family_gradient_terms<Family::mixture, FloatOps>(a.kind.fast, family_token<Family::mixture>(f, x, y, l),
                                                         Real{f.policy_mean}, Real{f.reference_mean}, Real{f.divergence_value});
    policy += g.policy.v;
    reference += g.reference.v;
  }
  s.policy_slope += block_sum(policy, room);
  s.reference_slope += block_sum(reference, room);
}

}  // namespace gpu
}  // namespace fusedkl
