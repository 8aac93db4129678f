// The terms of mixtures straight from p/q, two tokens at a time, without a division: what chunks take whose log-ratios are
// not all small, of kinds that balance. Per unit of q, with l in powers of 2:
//
//   above = min(l, 0) = log2(p/big),  below = -max(l, 0) = log2(q/big),  log_m = log2(m/big)
//   to_p = above - log_m = log2(p/m),  to_q = below - log_m = log2(q/m)
//
// m/big is at most 1 and at least min(beta, 1 - beta), where the hardware's logarithm is right to 2^-22 or so; beyond the reach
// of the polynomials the terms are large against that.
#pragma once
#include "family_args.h"
#include "gradient.cuh"

namespace fusedkl {
namespace gpu {

constexpr float kDirectReach = 40;  // |l| up to which p/q is used: no q underflows that has a p with digits to add

template <int FIRST>
FUSEDKL_DEVICE F2 series_at(const float (&c)[kSeriesTerms], F2 l) {
  F2 sum = both(c[kSeriesTerms - 1]);
#pragma unroll
  for (int j = kSeriesTerms - 2; j >= FIRST; j--) sum = fma2(sum, l, both(c[j]));
  return sum;
}

// 2^l - 1 for |l| <= log2(e), with l^2 at hand, to 1e-7: (2^l - 1 - l ln 2) / l^2 as its first 7 Chebyshev polynomials
FUSEDKL_DEVICE F2 near_expm1(F2 l, F2 square) {
  constexpr float c[] = {0.240226507f,   0.0555042103f,   0.00961814541f, 0.00133296393f,
                         0.00015399656f, 1.56278256e-05f, 1.35123139e-06f};
  F2 sum = both(c[6]);
#pragma unroll
  for (int j = 5; j >= 0; j--) sum = fma2(sum, l, both(c[j]));
  return fma2(square, sum, l * both(static_cast<float>(kLn2)));
}

struct DirectTerms {
  F2 value, slope, moved;  // as FamilyTerms, in units of ChunkFamily; (p - q)/q, only with MOVED
};

template <bool TWO_SIDED, bool MOVED>
FUSEDKL_DEVICE DirectTerms direct_terms(const ChunkFamily& k, F2 l) {
  const F2 above{fminf(l.x, 0.f), fminf(l.y, 0.f)}, below = above - l, ratio = exp2_fast(l), square = l * l;
  const F2 m = fma2(exp2_fast(below), both(k.beta), exp2_fast(above) * both(k.rest)), log_m{log2_fast(m.x), log2_fast(m.y)};
  const F2 to_p = above - log_m, to_q = below - log_m;
  F2 value, slope, moved{};
  if constexpr (TWO_SIDED) {
    // beta q to_q + rest p to_p;  rest p to_p + beta rest (q - p), in which near 0 nothing of the first order is left
    const F2 p = ratio * both(k.policy);
    value = fma2(p, to_p, to_q);
    slope = fma2(p, to_p - both(k.slope), both(k.apart));
  } else {
    // q to_q + rest (p - q);  beta (m - q)^2 / m
    const F2 apart = fma2(ratio, both(k.apart), both(-k.apart));
    value = to_q + apart;
    slope = apart * apart * (exp2_fast(to_q) * both(k.slope));
  }
  value = choose_near(l, k.near, square * series_at<2>(k.series.first, l), value);
  slope = choose_near(l, k.near, square * series_at<2>(k.series.second, l), slope);
  if constexpr (MOVED) moved = choose_near(l, k.near, near_expm1(l, square), ratio + both(-1.f));
  return {value, slope, moved};
}

}  // namespace gpu
}  // namespace fusedkl
