// Sweeps over one block of a row, a few thousand pairs that sit in the first-level cache. Sums are fp32 per lane inside a block
// and double from there on: longer fp32 chains round systematically when all terms are equal.
// Included once per instruction set, after its simd_*.h.
#pragma once
#include <float.h>
#include <math.h>
#include <string.h>

#include "../row_math.h"
#include "dtype.h"

namespace fusedkl {
namespace {

// Weights below 1e-38 count as 0 while a kernel runs: on x86 every operation on a subnormal number costs a hundred others.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  const unsigned saved_;
#endif
};

constexpr int kStep = 2 * kLanes;
constexpr int64_t kBlock = 64 * kStep;
constexpr float kNear = 40.f;  // |u| up to which e^u is formed from the reference's weight

// What a sweep is relative to. Differences are scaled by 1/T, never the logits: x/T at |x| = 1e4 would already cost 5e-4.
struct Frame {
  float log2e_t;    // log2(e) / T
  float inv_t;      // 1 / T
  float shift;      // weights are 2^(y log2e_t - shift)
  float centre_hi;  // the centre of x - y, in two floats
  float centre_lo;
  float policy_shift;  // careful sweeps weigh the policy on its own scale

  double centre() const { return static_cast<double>(centre_hi) + centre_lo; }
  void set_centre(double c) {
    centre_hi = static_cast<float>(c);
    centre_lo = static_cast<float>(c - centre_hi);
  }
  void set_coarse_centre(double c) {
    centre_hi = static_cast<float>(c);
    centre_lo = 0;
  }
};

struct BlockSums {
  CentredSums sums;
  double E, X;  // of sweeps for entropies: sums of w t and of w e^u t, t the exponent of w = 2^t
  float reach;  // largest |u|; NaN differences are not in it, they show in the sums
};

SIMD_INLINE vf exp2_lanes(vf t) {
  const vf r = exp2_fraction(t);
  vf p = fma(r, set1(kExp2[5]), set1(kExp2[4]));
  for (int j = 3; j >= 0; j--) p = fma(p, r, set1(kExp2[j]));
  return scale_floor(p, t);
}

// relative error 7.5e-5: for results stored in 16 bits, which round by 2e-3 (fp16: 5e-4)
SIMD_INLINE vf exp2_coarse(vf t) {
  const vf r = exp2_fraction(t);
  vf p = fma(r, set1(0.07802452f), set1(0.22606716f));
  p = fma(p, r, set1(0.69583354f));
  p = fma(p, r, set1(0.99992522f));
  return scale_floor(p, t);
}

// (x - y) - centre with the rounding error of x - y recovered (TwoDiff): with an offset of 1e4 it would drown small KLs.
SIMD_INLINE vf exact_difference(vf x, vf y, vf hi, vf lo) {
  const vf s = x - y, back = s - x, error = (x - (s - back)) - (y + back);
  return ((s - hi) + error) - lo;
}

// The one-sweep form. Differences of 16-bit logits are exact unless their exponents are 16 apart, so their centre is one float
// and nothing is recovered; a certificate sends rows where that matters to the sweep over fp32.
template <DType D>
SIMD_INLINE vf centred_difference(vf x, vf y, vf hi, vf lo) {
  if constexpr (D == DType::f32) return exact_difference(x, y, hi, lo);
  if constexpr (D == DType::apart) return (x - hi) - lo;
  return (x - y) - hi;
}

// The policy's logit. Of apart rows a difference stands in its place, which is NaN where neither row has the token.
template <DType D>
SIMD_INLINE vf policy_logit(vf x, vf y) {
  if constexpr (D == DType::apart) return select(equal(y, set1(-INFINITY)), y, x + y);
  return x;
}

// Long rows come from memory, and their arithmetic leaves the hardware's own prefetcher little room: ask for the lines
// kPrefetchBytes ahead. Past the end of a row that is at worst the next row's line.
constexpr int64_t kPrefetchBytes = 2048;

template <DType D>
SIMD_INLINE void prefetch_step(const void* base, int64_t i) {
  constexpr int64_t kSize = size_of(D);
  const char* const line = static_cast<const char*>(base) + i * kSize + kPrefetchBytes;
  for (int64_t b = 0; b < kStep * kSize; b += 64) __builtin_prefetch(line + b);
}

// Runs step(lane_group, x, y, keep) over the block; `keep` is 1 for real tokens. The tail is padded with copies of its first
// token, which stay in range, and their weight is multiplied by 0: every element takes the same instructions at every offset.
template <DType D, class Step>
SIMD_INLINE void sweep(const void* x, const void* y, int64_t n, Step step) {
  const vf one = set1(1.f);
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    vf x0, x1, y0, y1;
    prefetch_step<D>(x, i);
    prefetch_step<D>(y, i);
    load2<stored(D)>(x, i, x0, x1);
    load2<stored(D)>(y, i, y0, y1);
    step(0, x0, y0, one, false);
    step(1, x1, y1, one, false);
  }
  if (i == n) return;
  constexpr int64_t kSize = size_of(D);
  alignas(64) unsigned char tx[kStep * kSize], ty[kStep * kSize];
  alignas(64) float lane_of[kStep];
  for (int k = 0; k < kStep; k++) {
    const int64_t from = i + (i + k < n ? k : 0);
    memcpy(tx + k * kSize, static_cast<const char*>(x) + from * kSize, kSize);
    memcpy(ty + k * kSize, static_cast<const char*>(y) + from * kSize, kSize);
    // 16-bit loads deal elements to the two vectors in their own order: send the flags the same way
    lane_of[k] = i + k < n ? 1.f : 0.f;
  }
  alignas(64) unsigned char flags[kStep * kSize];
  for (int k = 0; k < kStep; k++) {
    const uint16_t one16 = D == DType::bf16 ? 0x3f80 : 0x3c00, flag = lane_of[k] != 0 ? one16 : 0;
    if constexpr (kSize == 4) memcpy(flags + k * 4, lane_of + k, 4);
    else memcpy(flags + k * 2, &flag, 2);
  }
  vf x0, x1, y0, y1, k0, k1;
  load2<stored(D)>(tx, 0, x0, x1);
  load2<stored(D)>(ty, 0, y0, y1);
  load2<stored(D)>(flags, 0, k0, k1);
  step(0, x0, y0, k0, true);
  step(1, x1, y1, k1, true);
}

#define STEP_INLINE __attribute__((always_inline))

template <int DEGREE>
SIMD_INLINE const float* polynomial() {
  return DEGREE == 4 ? kPoly4 : DEGREE == 6 ? kPoly6 : kPoly8;
}

struct LaneSums {
  vf S, A, B, C, E, X, reach;
};
SIMD_INLINE LaneSums zero_sums() { return {set1(0.f), set1(0.f), set1(0.f), set1(0.f), set1(0.f), set1(0.f), set1(0.f)}; }

// All |u| within the polynomial's range (the caller checks `reach`): one exponential and one polynomial per pair.
// The temperature is folded into the coefficients: with v = T u, g(u) = v^2 sum_j (c_j / T^(j+2)) v^j.
// MASKED: tokens at -inf in both rows are skipped (their weight is exactly 0, their difference is made so).
template <DType D, int DEGREE, bool REVERSE, bool ENTROPY, bool MASKED>
static BlockSums poly_block(const void* x, const void* y, int64_t n, const Frame& f) {
  const vf log2e = set1(f.log2e_t), minus_shift = set1(-f.shift), hi = set1(f.centre_hi), lo = set1(f.centre_lo);
  const vf inv_t = set1(f.inv_t), inv_t2 = set1(f.inv_t * f.inv_t), minus_one = set1(-1.f);
  [[maybe_unused]] const vf absent = set1(-INFINITY);
  vf coefficient[DEGREE + 1];
  double power = static_cast<double>(f.inv_t) * f.inv_t;
  for (int j = 0; j <= DEGREE; j++, power *= f.inv_t) coefficient[j] = set1(static_cast<float>(polynomial<DEGREE>()[j] * power));
  LaneSums acc[2] = {zero_sums(), zero_sums()};
  sweep<D>(x, y, n, [&](int group, vf xv, vf yv, vf keep, bool tail) STEP_INLINE {
    LaneSums& a = acc[group];
    vf t = fma_exact(yv, log2e, minus_shift), w = exp2_lanes(t);
    if (tail) w = w * keep;
    vf v = centred_difference<D>(xv, yv, hi, lo);
    if constexpr (MASKED) {
      const vm present = mask_not(mask_and(equal(policy_logit<D>(xv, yv), absent), equal(yv, absent)));
      v = zero_unless(present, v);
      t = zero_unless(present, t);
    }
    const vf v2 = v * v, wv2 = w * v2;
    vf P = coefficient[DEGREE];
    for (int j = DEGREE - 1; j >= 0; j--) P = fma(P, v, coefficient[j]);
    a.S = a.S + w;
    a.A = fma(w, v, a.A);
    a.B = fma(wv2, P, a.B);
    a.reach = max2(v2, a.reach);
    if constexpr (ENTROPY) {
      a.E = fma(w, t, a.E);
      a.X = fma(fma(wv2, P, fma(w * v, inv_t, w)), t, a.X);
    }
    if constexpr (REVERSE) a.C = fma(wv2, fma(P, fma(v, inv_t, minus_one), inv_t2), a.C);  // k(u) = u^2 (1 + P (u - 1))
  });
  BlockSums out;
  out.sums.S = sum_lanes(acc[0].S + acc[1].S);
  out.sums.A = static_cast<double>(sum_lanes(acc[0].A + acc[1].A)) * f.inv_t;
  out.sums.B = sum_lanes(acc[0].B + acc[1].B);
  if constexpr (REVERSE) out.sums.C = sum_lanes(acc[0].C + acc[1].C);
  out.E = ENTROPY ? sum_lanes(acc[0].E + acc[1].E) : 0;
  out.X = ENTROPY ? sum_lanes(acc[0].X + acc[1].X) : 0;
  out.reach = sqrtf(max_lanes(max2(acc[0].reach, acc[1].reach))) * f.inv_t;
  return out;
}

// What the beginning of a row tells of its differences: sum w, sum w u and the largest |u|, tokens masked in both rows skipped.
struct Probe {
  double S, A;
  float reach;
};

template <DType D>
static Probe probe_block(const void* x, const void* y, int64_t n, const Frame& f) {
  const vf log2e = set1(f.log2e_t), minus_shift = set1(-f.shift), hi = set1(f.centre_hi), lo = set1(f.centre_lo);
  const vf inv_t = set1(f.inv_t), absent = set1(-INFINITY);
  vf S = set1(0.f), A = set1(0.f), reach = set1(0.f);
  sweep<D>(x, y, n, [&](int, vf xv, vf yv, vf keep, bool tail) STEP_INLINE {
    vf w = exp2_lanes(fma_exact(yv, log2e, minus_shift));
    if (tail) w = w * keep;
    const vm present = mask_not(mask_and(equal(policy_logit<D>(xv, yv), absent), equal(yv, absent)));
    const vf u = zero_unless(present, centred_difference<D>(xv, yv, hi, lo) * inv_t);
    S = S + w;
    A = fma(w, u, A);
    reach = max_abs(reach, u);
  });
  return {sum_lanes(S), sum_lanes(A), max_lanes(reach)};
}

// e^u = s (1 + r + q) with s = 2^k, r = u - k ln2. For k = 0 both s - 1 and r - u vanish exactly, so g(u) and k(u) keep their
// relative accuracy at small u and no blend of two formulas is needed.
struct Split {
  vf s, r, q;
};
SIMD_INLINE Split split_exponential(vf u) {
  const vf k = round_even(u * set1(static_cast<float>(kLog2e))), r = fnma_exact(k, set1(static_cast<float>(kLn2)), u);
  vf P = set1(kPolySplit[4]);
  for (int j = 3; j >= 0; j--) P = fma(P, r, set1(kPolySplit[j]));
  return {pow2_int(k), r, (r * r) * P};
}
SIMD_INLINE vf g_lanes(const Split& e, vf u) { return fma(e.s, e.q, fma(e.s, e.r, (e.s - set1(1.f)) - u)); }
SIMD_INLINE vf k_lanes(const Split& e, vf u) { return e.s * fma(e.q, u - set1(1.f), fma(u, e.r, u - e.r)) - (e.s - set1(1.f)); }
SIMD_INLINE vf expm1_lanes(const Split& e) { return fma(e.s, e.q + e.r, e.s - set1(1.f)); }

// Any |u| <= kNear. MASKED as above.
template <DType D, bool REVERSE, bool ENTROPY, bool MASKED>
static BlockSums split_block(const void* x, const void* y, int64_t n, const Frame& f) {
  const vf log2e = set1(f.log2e_t), minus_shift = set1(-f.shift), hi = set1(f.centre_hi), lo = set1(f.centre_lo);
  const vf inv_t = set1(f.inv_t);
  [[maybe_unused]] const vf absent = set1(-INFINITY);
  LaneSums acc[2] = {zero_sums(), zero_sums()};
  sweep<D>(x, y, n, [&](int group, vf xv, vf yv, vf keep, bool tail) STEP_INLINE {
    LaneSums& a = acc[group];
    vf t = fma_exact(yv, log2e, minus_shift), w = exp2_lanes(t);
    if (tail) w = w * keep;
    vf u = centred_difference<D>(xv, yv, hi, lo) * inv_t;
    if constexpr (MASKED) {
      const vm present = mask_not(mask_and(equal(policy_logit<D>(xv, yv), absent), equal(yv, absent)));
      u = zero_unless(present, u);
      t = zero_unless(present, t);
    }
    const Split e = split_exponential(u);
    a.S = a.S + w;
    a.A = fma(w, u, a.A);
    a.B = fma(w, g_lanes(e, u), a.B);
    a.reach = max_abs(a.reach, u);
    if constexpr (ENTROPY) {
      a.E = fma(w, t, a.E);
      a.X = fma(fma(w, expm1_lanes(e), w), t, a.X);
    }
    if constexpr (REVERSE) a.C = fma(w, k_lanes(e, u), a.C);
  });
  BlockSums out;
  out.sums.S = sum_lanes(acc[0].S + acc[1].S);
  out.sums.A = sum_lanes(acc[0].A + acc[1].A);
  out.sums.B = sum_lanes(acc[0].B + acc[1].B);
  if constexpr (REVERSE) out.sums.C = sum_lanes(acc[0].C + acc[1].C);
  out.E = ENTROPY ? sum_lanes(acc[0].E + acc[1].E) : 0;
  out.X = ENTROPY ? sum_lanes(acc[0].X + acc[1].X) : 0;
  out.reach = max_lanes(max2(acc[0].reach, acc[1].reach));
  return out;
}

template <DType D>
static float max_policy(const void* x, const void* y, int64_t n) {
  vf m[2] = {set1(-INFINITY), set1(-INFINITY)};
  sweep<D>(x, y, n, [&](int group, vf xv, vf yv, vf, bool) STEP_INLINE { m[group] = max2(policy_logit<D>(xv, yv), m[group]); });
  return max_lanes(max2(m[0], m[1]));
}

template <DType D>
static float max_block(const void* x, int64_t n) {
  return max_policy<D>(x, x, n);
}

// ---- the careful sweeps: both rows weighed on their own scale, nothing can overflow, any support

struct MassSums {
  double policy = 0, reference = 0, difference = 0;  // sum wx, sum wy, sum wy ((x - y) - centre) over tokens finite in both
};

template <DType D>
static MassSums mass_block(const void* x, const void* y, int64_t n, const Frame& f) {
  const vf log2e = set1(f.log2e_t), shift_x = set1(-f.policy_shift), shift_y = set1(-f.shift), absent = set1(-INFINITY);
  const vf hi = set1(f.centre_hi), lo = set1(f.centre_lo);
  vf sx[2] = {set1(0.f), set1(0.f)}, sy[2] = {set1(0.f), set1(0.f)}, sd[2] = {set1(0.f), set1(0.f)};
  sweep<D>(x, y, n, [&](int group, vf xv, vf yv, vf keep, bool tail) STEP_INLINE {
    vf wx = exp2_lanes(fma_exact(xv, log2e, shift_x)), wy = exp2_lanes(fma_exact(yv, log2e, shift_y));
    if (tail) wx = wx * keep, wy = wy * keep;
    const vm one_sided = mask_or(equal(xv, absent), equal(yv, absent));
    sx[group] = sx[group] + wx;
    sy[group] = sy[group] + wy;
    sd[group] = fma(wy, zero_unless(mask_not(one_sided), exact_difference(xv, yv, hi, lo)), sd[group]);
  });
  return {sum_lanes(sx[0] + sx[1]), sum_lanes(sy[0] + sy[1]), sum_lanes(sd[0] + sd[1])};
}

// Sums over near tokens (|u| <= kNear, finite in both rows) about the centre, and plain masses of all others.
struct CarefulSums {
  double S = 0, A = 0, B = 0, C = 0;
  double far_policy = 0, far_reference = 0;            // sum wx, sum wy
  double far_policy_u = 0, far_reference_u = 0;        // sum wx u, sum wy u
  bool policy_lacks = false, reference_lacks = false;  // a token of the one that the other excludes
};

// One set of accumulators for both vectors of a step, or the registers run out; hence blocks of half the length.
constexpr int64_t kCarefulBlock = kBlock / 2;

template <DType D>
static CarefulSums careful_block(const void* x, const void* y, int64_t n, const Frame& f) {
  const vf log2e = set1(f.log2e_t), shift_x = set1(-f.policy_shift), shift_y = set1(-f.shift), absent = set1(-INFINITY);
  const vf hi = set1(f.centre_hi), lo = set1(f.centre_lo), inv_t = set1(f.inv_t), zero = set1(0.f);
  vf S = zero, A = zero, B = zero, C = zero, far_x = zero, far_y = zero, far_xu = zero, far_yu = zero;
  vm one_sided_x = equal(zero, set1(1.f)), one_sided_y = one_sided_x;
  sweep<D>(x, y, n, [&](int, vf xv, vf yv, vf keep, bool tail) STEP_INLINE {
    vf wx = exp2_lanes(fma_exact(xv, log2e, shift_x)), wy = exp2_lanes(fma_exact(yv, log2e, shift_y));
    if (tail) wx = wx * keep, wy = wy * keep;
    const vm no_x = equal(xv, absent), no_y = equal(yv, absent), both = mask_not(mask_or(no_x, no_y));
    one_sided_x = mask_or(one_sided_x, mask_and(no_x, mask_not(no_y)));
    one_sided_y = mask_or(one_sided_y, mask_and(no_y, mask_not(no_x)));
    // a span beyond fp32's range saturates instead of becoming 0 * inf
    const vf u = max2(set1(-FLT_MAX), min2(set1(FLT_MAX), zero_unless(both, exact_difference(xv, yv, hi, lo) * inv_t)));
    const vm near = mask_and(both, not_above(abs1(u), set1(kNear)));
    const vf un = zero_unless(near, u), uf = zero_unless(mask_not(near), u);
    const Split e = split_exponential(un);
    S = S + wy;
    A = fma(wy, un, A);
    B = fma(wy, g_lanes(e, un), B);
    C = fma(wy, k_lanes(e, un), C);
    far_x = far_x + zero_unless(mask_not(near), wx);
    far_y = far_y + zero_unless(mask_not(near), wy);
    far_xu = fma(wx, uf, far_xu);
    far_yu = fma(wy, uf, far_yu);
  });
  return {sum_lanes(S),     sum_lanes(A),      sum_lanes(B),      sum_lanes(C),     sum_lanes(far_x),
          sum_lanes(far_y), sum_lanes(far_xu), sum_lanes(far_yu), any(one_sided_x), any(one_sided_y)};
}

// ---- one row alone, the policy's; of the other one, only what apart rows need

// Sums about the largest logit so far; `max` tells where a block has a larger one and must be done again.
struct WeightSum {
  double sum;
  float max;
};

template <DType D>
static WeightSum weight_block(const void* x, const void* y, int64_t n, float log2e_t, float about) {
  const vf log2e = set1(log2e_t), m = set1(about);
  vf s[2] = {set1(0.f), set1(0.f)}, top[2] = {set1(-INFINITY), set1(-INFINITY)};
  sweep<D>(x, y, n, [&](int group, vf xv, vf yv, vf keep, bool tail) STEP_INLINE {
    const vf logit = policy_logit<D>(xv, yv);
    vf w = exp2_lanes((logit - m) * log2e);  // exactly 1 at the maximum
    if (tail) w = w * keep;
    s[group] = s[group] + w;
    top[group] = max2(logit, top[group]);
  });
  return {sum_lanes(s[0] + s[1]), max_lanes(max2(top[0], top[1]))};
}

struct BlockEntropy : EntropySums {
  float max = 0;
};

template <DType D>
static BlockEntropy entropy_block(const void* x, const void* y, int64_t n, float log2e_t, float inv_t, float about) {
  const vf log2e = set1(log2e_t), m = set1(about), large = set1(0x1p100f);
  vf rest[2] = {set1(0.f), set1(0.f)}, gap[2] = {set1(0.f), set1(0.f)}, top[2] = {set1(-INFINITY), set1(-INFINITY)};
  vf ties[2] = {set1(0.f), set1(0.f)};
  sweep<D>(x, y, n, [&](int group, vf xv, vf yv, vf keep, bool) STEP_INLINE {
    const vf logit = policy_logit<D>(xv, yv);
    const vm tie = equal(logit, m);
    const vf down = logit - m, w = exp2_lanes(down * log2e) * keep;
    ties[group] = ties[group] + zero_unless(tie, keep);
    rest[group] = rest[group] + zero_unless(mask_not(tie), w);
    gap[group] = fma(w, min2(large, set1(0.f) - down), gap[group]);  // -inf: 0 * 2^100
    top[group] = max2(logit, top[group]);
  });
  BlockEntropy out;
  out.ties = sum_lanes(ties[0] + ties[1]);
  out.rest = sum_lanes(rest[0] + rest[1]);
  out.gap = static_cast<double>(sum_lanes(gap[0] + gap[1])) * inv_t;
  out.max = max_lanes(max2(top[0], top[1]));
  return out;
}

}  // namespace
}  // namespace fusedkl
