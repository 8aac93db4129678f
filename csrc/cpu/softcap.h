// Rows under a softcap c tanh(x/c), in float. A difference of two capped logits of size 30 has an error of 3e-6, which is the
// rounding noise that this library exists to avoid: it is therefore formed from the logits themselves,
//   tanh a - tanh b = sinh(a - b) / (cosh a cosh b),
// the policy's row being given by its difference from the reference's, and that one about its largest logit (DType::apart).
// Included once per instruction set, after family_kernels.h.
#pragma once

namespace fusedkl {
namespace {

struct Softcap {
  vf cap, minus_two;  // c, -2/c
  explicit Softcap(double c) : cap(set1(static_cast<float>(c))), minus_two(set1(static_cast<float>(-2 / c))) {}

  // e^(-2 v/c) of v >= 0. Split, because 1 less this must keep its digits.
  __attribute__((always_inline)) Split decay(vf v) const { return split_exponential(max2(set1(-120.f), v * minus_two)); }
  __attribute__((always_inline)) vf left(vf v) const {
    const Split e = decay(v);
    return fma(e.s, e.q + e.r, e.s);
  }

  // The difference of two logits under the cap, given what is left of each: with A = e^(-2 |x|/c), B likewise and no overflow,
  //   2 c sign(x - y) (1 - e^(-2 |x - y|/c)) / ((1 + A) (1 + B)), times the larger of A and B where both have the same sign.
  __attribute__((always_inline)) vf difference(vf x, vf A, vf y, vf B) const {
    const vf zero = set1(0.f), one = set1(1.f), d = x - y;
    const vm low_x = not_above(x, zero), low_y = not_above(y, zero);
    const vm alike = mask_or(mask_and(low_x, low_y), mask_not(mask_or(low_x, low_y)));
    const vf size = select(alike, max2(A, B), one) * (cap + cap) / ((one + A) * (one + B));
    return select(not_above(zero, d), zero - size, size) * expm1_lanes(decay(abs1(d)));
  }

  // 1 - tanh^2 of v >= 0
  __attribute__((always_inline)) vf slope(vf v) const {
    const vf A = left(v), sum = A + set1(1.f);
    return set1(4.f) * A / (sum * sum);
  }
};

// Where tanh is neither the identity nor a step to float, and for logits that are numbers.
static bool in_range(double c) { return c > 1e-3 && c < 1e6; }
constexpr float kLargest = 1e30f;

// run(v0, v1) -> (v0, v1), in place
template <class Run>
SIMD_INLINE void map_in_place(float* v, int64_t n, Run run) {
  map_row<DType::f32>(v, v, v, nullptr, n,
                      [&](vf x0, vf x1, vf, vf, vf& a0, vf& a1, vf&, vf&) STEP_INLINE { a0 = run(x0), a1 = run(x1); });
}

static bool softcap_row(float* x, int64_t n, double c, double& max) {
  [[maybe_unused]] const FlushSubnormals scope;
  const float top = max_block<DType::f32>(x, n);
  if (!in_range(c) || !(fabsf(top) < kLargest)) return false;
  max = softcapped(top, c);
  const Softcap s(c);
  const vf m = set1(top), at_m = s.left(abs1(m)), absent = set1(-INFINITY), least = set1(-kLargest);
  vm odd = equal(absent, m);
  map_in_place(x, n, [&](vf v) STEP_INLINE {
    const vm none = equal(v, absent);
    odd = mask_or(odd, mask_not(mask_or(none, not_above(least, v))));
    return select(none, absent, s.difference(v, s.left(abs1(v)), m, at_m));
  });
  return !any(odd);
}

static bool softcap_pair(float* x, float* y, int64_t n, double c, double& max) {
  [[maybe_unused]] const FlushSubnormals scope;
  const float top = max_block<DType::f32>(y, n);
  if (!in_range(c) || !(fabsf(top) < kLargest)) return false;
  max = softcapped(top, c);
  const Softcap s(c);
  const vf m = set1(top), at_m = s.left(abs1(m)), absent = set1(-INFINITY), largest = set1(kLargest);
  vm odd = equal(absent, m);
  auto pair = [&](vf x_, vf y_, vf& d, vf& about) STEP_INLINE {
    const vm none = mask_and(equal(x_, absent), equal(y_, absent));
    const vm some = mask_and(not_above(abs1(x_), largest), not_above(abs1(y_), largest));
    odd = mask_or(odd, mask_not(mask_or(none, some)));  // in one row alone, or no number
    const vf A = s.left(abs1(x_)), B = s.left(abs1(y_));
    d = s.difference(x_, A, y_, B);  // absent - absent = NaN, as of rows without a cap
    about = select(none, absent, s.difference(y_, B, m, at_m));
  };
  map_row<DType::f32>(x, y, x, y, n, [&](vf x0, vf x1, vf y0, vf y1, vf& a0, vf& a1, vf& b0, vf& b1) STEP_INLINE {
    pair(x0, y0, a0, b0);
    pair(x1, y1, a1, b1);
  });
  return !any(odd);
}

template <DType D>
static void store_softcapped(const float* gradient, const void* logits, void* to, int64_t n, double c) {
  [[maybe_unused]] const FlushSubnormals scope;
  const Softcap s(c);
  alignas(64) float room[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t size = n - i < kBlock ? n - i : kBlock;
    widen_block<D>(static_cast<const char*>(logits) + i * size_of(D), room, size);
    map_row<DType::f32>(gradient + i, room, nullptr, room, size,
                        [&](vf g0, vf g1, vf x0, vf x1, vf&, vf&, vf& b0, vf& b1) STEP_INLINE {
                          b0 = g0 * s.slope(abs1(x0));
                          b1 = g1 * s.slope(abs1(x1));
                        });
    narrow_block<D>(room, static_cast<char*>(to) + i * size_of(D), size);
  }
}

static bool apart_divergence(const void* d, const void* y, int64_t n, double inv_t, bool reverse, bool& entropies,
                             RowState& out) {
  return in_one_sweep<DType::apart>(d, y, n, inv_t, reverse, entropies, out) == Sweep::done;
}

constexpr SoftcapKernels kSoftcapKernels = {
    softcap_pair,
    softcap_row,
    apart_divergence,
    gradient_row<DType::apart>,
    family_sums<DType::apart>,
    family_gradient<DType::apart>,
    {store_softcapped<DType::f32>, store_softcapped<DType::bf16>, store_softcapped<DType::f16>},
};

}  // namespace
}  // namespace fusedkl
