// Conversions and the two sweeps of log_softmax, over fp32 buffers. Included once per instruction set, after block_kernels.h.
#pragma once

namespace fusedkl {
namespace {

template <DType D>
static void widen_block(const void* from, float* to, int64_t n) {
  int64_t i = 0;
  if constexpr (D == DType::f32) {
    memcpy(to, from, static_cast<size_t>(n) * 4);
    return;
  } else if constexpr (D == DType::f16) {
    for (; i + kStep <= n; i += kStep) {
      vf a, b;
      load2<D>(from, i, a, b);
      store2<DType::f32>(to, i, a, b);
    }
  }
  for (; i < n; i++) to[i] = load_float<D>(from, i);  // bf16: a shift, which the compiler vectorises in order
}

template <DType D>
static void narrow_block(const float* from, void* to, int64_t n) {
  int64_t i = 0;
  if constexpr (D == DType::f32) {
    memcpy(to, from, static_cast<size_t>(n) * 4);
    return;
  } else if constexpr (D == DType::f16) {
    for (; i + kStep <= n; i += kStep) {
      vf a, b;
      load2<DType::f32>(from, i, a, b);
      store2<D>(to, i, a, b);
    }
  }
  for (; i < n; i++) static_cast<uint16_t*>(to)[i] = D == DType::bf16 ? float_to_bf16(from[i]) : float_to_half(from[i]);
}

static void log_softmax_block(float* v, int64_t n, const RowState& s) {
  const float max = static_cast<float>(s.policy_max), log_sum = static_cast<float>(s.policy_log_sum);
  for (int64_t i = 0; i < n; i++) v[i] = (v[i] - max) - log_sum;
}

static double sum_block(const float* v, int64_t n) {
  vf s[2] = {set1(0.f), set1(0.f)};
  sweep<DType::f32>(v, v, n,
                    [&](int group, vf a, vf, vf keep, bool tail) STEP_INLINE { s[group] = s[group] + (tail ? a * keep : a); });
  return sum_lanes(s[0] + s[1]);
}

// of the logits less the first one: a common offset must not cost their digits
template <DType D>
static double logit_sum_row(const void* x, int64_t n) {
  constexpr int64_t kSize = size_of(D);
  const float first = load_float<D>(x, 0), about = first - first == 0 ? first : 0.f;
  double total = 0;
  for (int64_t i = 0; i < n; i += kBlock) {
    const void* const block = static_cast<const char*>(x) + i * kSize;
    vf s[2] = {set1(0.f), set1(0.f)};
    sweep<D>(block, block, n - i < kBlock ? n - i : kBlock, [&](int group, vf a, vf, vf keep, bool tail) STEP_INLINE {
      const vf d = a - set1(about);
      s[group] = s[group] + (tail ? zero_unless(equal(keep, set1(1.f)), d) : d);
    });
    total += sum_lanes(s[0] + s[1]);
  }
  return total + static_cast<double>(about) * static_cast<double>(n);
}

static void log_softmax_gradient_block(const float* output, float* grad, int64_t n, double grad_sum) {
  const vf log2e = set1(static_cast<float>(kLog2e)), total = set1(static_cast<float>(grad_sum));
  int64_t i = 0;
  vf o0, o1, g0, g1;
  for (; i + kStep <= n; i += kStep) {
    load2<DType::f32>(output, i, o0, o1);
    load2<DType::f32>(grad, i, g0, g1);
    store2<DType::f32>(grad, i, fnma(exp2_lanes(o0 * log2e), total, g0), fnma(exp2_lanes(o1 * log2e), total, g1));
  }
  if (i == n) return;
  alignas(64) float to[kStep] = {}, tg[kStep] = {};
  memcpy(to, output + i, static_cast<size_t>(n - i) * 4);
  memcpy(tg, grad + i, static_cast<size_t>(n - i) * 4);
  load2<DType::f32>(to, 0, o0, o1);
  load2<DType::f32>(tg, 0, g0, g1);
  store2<DType::f32>(tg, 0, fnma(exp2_lanes(o0 * log2e), total, g0), fnma(exp2_lanes(o1 * log2e), total, g1));
  memcpy(grad + i, tg, static_cast<size_t>(n - i) * 4);
}

}  // namespace
}  // namespace fusedkl
