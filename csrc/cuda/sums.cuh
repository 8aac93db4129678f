// The hot loop: one warp's sums over its share of a segment, in one sweep.
//
// A warp keeps one centre and one reference exponent for its 32 lanes, and moves them only when a token outweighs what they
// were made from (a vote per tile). So the loop has no running maximum, no rescaling, no shuffle and no barrier: two
// exponentials, a polynomial and the sums. Weights are on the reference's scale about the centre:
//   wy = 2^(y slope - exponent), wx = wy e^u = 2^(x slope - policy_exponent), slope = log2(e)/T, v = (x - y) - centre = T u
// wx is made of x, not of y and v: of a token that only the reference masks, by -1e9, these are both rounded by 64.
#pragma once
#include "args.h"
#include "logits.cuh"

namespace fusedkl {
namespace gpu {

struct Temperature {
  double inverse;
  float inv_t, slope;
  float near;  // |x - y - centre| up to which the polynomial holds: T/2
  FUSEDKL_DEVICE explicit Temperature(double inv)
      : inverse(inv),
        inv_t(static_cast<float>(inv)),
        slope(static_cast<float>(kLog2e * inv)),
        near(0.5f / static_cast<float>(inv)) {}
};

// Per lane, two tokens side by side. With kEntropy, policy excludes the tokens equal to the largest one, and policy_log is
// sum wx log2(wx) over the same tokens: a peaked row's entropy is made of what is left beside its peak. Likewise reference.
struct LaneSums {
  F2 reference, policy, a, b, c, policy_log, reference_log;
  int policy_ties, reference_ties;
};

// The same in all lanes.
struct Anchor {
  float exponent = -INFINITY;    // in powers of 2
  float policy_exponent = NAN;   // exponent + centre slope; NaN: not known
  float centre = 0, fine = 0;    // of x - y, in two floats (one for 16-bit logits)
  float policy_top = -INFINITY;  // largest logits so far; only where an entropy wants them
  float reference_top = -INFINITY;
};

template <DType X, DType Y>
constexpr bool kExactDifference = X == DType::f32 || Y == DType::f32;

// (x - y) - centre. For fp32 the rounding of x - y is recovered: with an offset of 1e4 it would drown a small KL.
// Differences of 16-bit logits are exact unless their exponents are far apart; a certificate sends those rows elsewhere.
template <DType X, DType Y>
FUSEDKL_DEVICE F2 centred(F2 x, F2 y, F2 centre, F2 fine) {
  const F2 s = x - y;
  if constexpr (!kExactDifference<X, Y>) return s - centre;
  const F2 back = s - x, error = (x - (s - back)) - (y + back);
  return ((s - centre) + error) - fine;
}

// g(u)/u^2 for |u| <= 1/2, one by one: device code has no address of a host array
template <int J>
constexpr float kSeries = kPoly4[J];

// Constants of a warp's tiles, splatted. The temperature is in the coefficients: g(u) = v^2 sum_j (c_j / T^(j+2)) v^j.
struct TileFrame {
  F2 slope, minus_exponent, minus_policy, centre, fine, inv_t, coefficient[5];
  float near;

  FUSEDKL_DEVICE TileFrame(const Temperature& t, const Anchor& anchor) {
    slope = both(t.slope);
    minus_exponent = both(-anchor.exponent);
    minus_policy = both(-anchor.policy_exponent);
    centre = both(anchor.centre);
    fine = both(anchor.fine);
    inv_t = both(t.inv_t);
    const float i1 = t.inv_t, i2 = i1 * i1, i3 = i2 * i1, i4 = i2 * i2;
    coefficient[0] = both(kSeries<0> * i2);
    coefficient[1] = both(kSeries<1> * i3);
    coefficient[2] = both(kSeries<2> * i4);
    coefficient[3] = both(kSeries<3> * (i4 * i1));
    coefficient[4] = both(kSeries<4> * (i4 * i2));
    near = t.near;
  }
};

// One pair of tokens. CHECKED: live tells which of the two exist (a token absent from both rows does not), tie_* which are
// kept out of the entropy's sums; else all are live and none is a tie.
struct Liveness {
  bool live[2], policy_tie[2], reference_tie[2];
};

template <int MODE, DType X, DType Y, bool CHECKED>
FUSEDKL_DEVICE void add_pair(LaneSums& s, const TileFrame& f, F2 x, F2 y, const Liveness& which) {
  F2 v = centred<X, Y>(x, y, f.centre, f.fine);
  F2 zy = fma2(y, f.slope, f.minus_exponent), zx = fma2(x, f.slope, f.minus_policy);
  if constexpr (CHECKED) {
    v = {which.live[0] ? v.x : 0.f, which.live[1] ? v.y : 0.f};
    zy = {which.live[0] ? zy.x : -INFINITY, which.live[1] ? zy.y : -INFINITY};
    zx = {which.live[0] ? zx.x : -INFINITY, which.live[1] ? zx.y : -INFINITY};
  }
  const F2 wy = exp2_fast(zy), wx = exp2_fast(zx);
  F2 p = f.coefficient[4];
#pragma unroll
  for (int j = 3; j >= 0; j--) p = fma2(p, v, f.coefficient[j]);
  const F2 wv = wy * v, square = wv * v;
  const F2 series = square * p, difference = wx - fma2(wv, f.inv_t, wy);
  s.a = s.a + wv;
  s.b = s.b + choose_near(v, f.near, series, difference);
  if constexpr ((MODE & kReverse) != 0) {
    // k(u) = u^2 + (u - 1) g(u), far from 0: 1 + (u - 1) e^u
    const F2 below = fma2(v, f.inv_t, both(-1.f)), inv_t2 = f.inv_t * f.inv_t;
    s.c = s.c + choose_near(v, f.near, fma2(series, below, square * inv_t2), fma2(wx, below, wy));
  }
  F2 kept_x = wx, kept_y = wy;
  if constexpr (CHECKED && (MODE & kEntropy) != 0) {
    kept_x = {which.policy_tie[0] ? 0.f : wx.x, which.policy_tie[1] ? 0.f : wx.y};
    s.policy_ties += which.policy_tie[0] + which.policy_tie[1];
  }
  if constexpr (CHECKED && (MODE & kReferenceEntropy) != 0) {
    kept_y = {which.reference_tie[0] ? 0.f : wy.x, which.reference_tie[1] ? 0.f : wy.y};
    s.reference_ties += which.reference_tie[0] + which.reference_tie[1];
  }
  s.policy = s.policy + kept_x;
  s.reference = s.reference + kept_y;
  if constexpr ((MODE & kEntropy) != 0) {
    // a weight that underflowed counts as 0, not as 0 times the logarithm of a token that does not exist
    const F2 z = CHECKED ? F2{kept_x.x > 0 ? zx.x : 0.f, kept_x.y > 0 ? zx.y : 0.f} : zx;
    s.policy_log = fma2(kept_x, z, s.policy_log);
  }
  if constexpr ((MODE & kReferenceEntropy) != 0) {
    const F2 z = CHECKED ? F2{kept_y.x > 0 ? zy.x : 0.f, kept_y.y > 0 ? zy.y : 0.f} : zy;
    s.reference_log = fma2(kept_y, z, s.reference_log);
  }
}

// ---- cold: a new anchor

// Calls each(x, y) for the tokens of this lane's part of a tile that exist; the tile is read again, from cache.
template <DType X, DType Y, class Fetch, class Each>
FUSEDKL_DEVICE void for_each_live(const Fetch& fetch, int vectors, const Each& each) {
#pragma unroll 1
  for (int j = 0; j < vectors; j++) {
    Chunk<X> cx;
    Chunk<Y> cy;
    const int count = fetch(j, cx, cy);
#pragma unroll
    for (int i = 0; i < kChunk / 2; i++) {
      const F2 x = pair_of(cx, i), y = pair_of(cy, i);
      if (2 * i < count && !(x.x == -INFINITY && y.x == -INFINITY)) each(x.x, y.x);
      if (2 * i + 1 < count && !(x.y == -INFINITY && y.y == -INFINITY)) each(x.y, y.y);
    }
  }
}

// exponent + centre slope, or NaN where its rounding would show in wx - wy (4e-6): a row with tokens far from the centre then is left
// to the exact kernel, others need no wx.
FUSEDKL_DEVICE float policy_exponent(const Anchor& anchor, float slope) {
  const float whole = fmaf(anchor.centre, slope, anchor.exponent);
  return fabsf(whole) < 64 ? whole : NAN;
}

// The exponent from the tile's largest reference logit, the centre from its weighted mean. The mean is taken about the
// difference at that logit: a constant difference then is the centre exactly, and its divergence exactly 0.
template <DType X, DType Y, class Fetch>
FUSEDKL_DEVICE void anchor_on_tile(Anchor& anchor, const Fetch& fetch, int vectors, float top, const Temperature& t) {
  if (!(top > -INFINITY)) return;
  float origin = 0;
  bool found = false;
  for_each_live<X, Y>(fetch, vectors, [&](float x, float y) {
    if (y == top) origin = x - y, found = true;
  });
  const unsigned holders = __ballot_sync(kAllLanes, found);
  if (holders == 0) return;  // NaN
  origin = __shfl_sync(kAllLanes, origin, __ffs(static_cast<int>(holders)) - 1);
  if (!is_finite(origin)) origin = 0;
  anchor.exponent = top * t.slope;
  float weight = 0, mean = 0;
  for_each_live<X, Y>(fetch, vectors, [&](float x, float y) {
    const F2 v = centred<X, Y>({x, x}, {y, y}, both(origin), both(0.f));
    const float w = exp2_fast(fmaf(y, t.slope, -anchor.exponent));
    if (w > 0 && is_finite(v.x)) weight += w, mean = fmaf(w, v.x, mean);
  });
  weight = warp_sum(weight);
  mean = divide_fast(warp_sum(mean), weight);
  if (!is_finite(mean)) mean = 0;
  anchor.centre = origin + mean;
  anchor.fine = kExactDifference<X, Y> ? mean - (anchor.centre - origin) : 0;
  anchor.policy_exponent = policy_exponent(anchor, t.slope);
}

}  // namespace gpu
}  // namespace fusedkl
