// The sweeps of kl_div for one instruction set, written once over the compiler's vector type. Included by kl_div.cpp once per
// instruction set, inside a target region and a namespace of its own; KL_VECTOR_BYTES is the width of a vector.
//
//   element   log_target false: t log t - t x        true: e^t (t - x)        x = input (log-probabilities), t = target
//   d/dx      -g t                                   -g e^t
//   d/dt      g log t + g t/t - g x                  g (t - x) e^t + g e^t
//
// The expressions, not only the values, are those of torch's composition and its autograd: which inputs give NaN or infinity
// follows from the order of operations, but where both of two fused products would overflow (3e38 against 3e38 is -inf here, NaN
// there) or where torch rounds a factor to 16 bits. Arithmetic is float (double for double), sums are double.

#define KL_INLINE static inline __attribute__((always_inline))

namespace {

typedef float vfloat __attribute__((vector_size(KL_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(KL_VECTOR_BYTES)));
typedef uint32_t vuint32 __attribute__((vector_size(KL_VECTOR_BYTES)));
typedef int32_t vint32 __attribute__((vector_size(KL_VECTOR_BYTES)));
typedef uint64_t vuint64 __attribute__((vector_size(KL_VECTOR_BYTES)));
typedef uint16_t vuint16 __attribute__((vector_size(KL_VECTOR_BYTES / 2)));

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The same summation tree whatever the width of a vector.
constexpr int kLanes = 32;
constexpr int kStepsPerFold = 16;  // float lanes are folded into double lanes before they lose digits

// One rounding where the hardware has it; nothing depends on it but the last bit.
#if KL_VECTOR_BYTES == 64
KL_INLINE vfloat madd(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
KL_INLINE vdouble madd(vdouble a, vdouble b, vdouble c) { return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
#elif KL_VECTOR_BYTES == 32
KL_INLINE vfloat madd(vfloat a, vfloat b, vfloat c) { return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
KL_INLINE vdouble madd(vdouble a, vdouble b, vdouble c) { return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
#else
KL_INLINE vfloat madd(vfloat a, vfloat b, vfloat c) { return a * b + c; }
KL_INLINE vdouble madd(vdouble a, vdouble b, vdouble c) { return a * b + c; }
#endif

// Everything that depends on the float type; the coefficients are minimax, largest relative error of the function in brackets.
template <class V>
struct Format;

template <>
struct Format<vfloat> {
  using Real = float;
  using Bits = vuint32;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr uint32_t kOne = 0x3f800000, kSqrtHalf = 0x3f3504f3, kInteger = 0x4b000000;  // kInteger: 2^23
  static constexpr float kMagic = 0x1.8p23f, kTwoToMantissa = 0x1p23f, kTiny = 0x1p-126f, kLift = 0x1p25f, kLifted = 25.f;
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cf8p-20f, kExpLow = -105.f, kExpHigh = 90.f;
  static constexpr float kLog[] = {0.666667763816f, 0.399775415767f, 0.298717277320f};  // [8e-10]
  static constexpr float kExp[] = {0.499999934125f, 0.166665201078f, 0.0416683942109f, 0.00836878041118f,
                                   0.00138144670593f};  // [3e-9]
};

template <>
struct Format<vdouble> {
  using Real = double;
  using Bits = vuint64;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr uint64_t kOne = 0x3ff0000000000000, kSqrtHalf = 0x3fe6a09e667f3bcd, kInteger = 0x4330000000000000;
  static constexpr double kMagic = 0x1.8p52, kTwoToMantissa = 0x1p52, kTiny = 0x1p-1022, kLift = 0x1p54, kLifted = 54.;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33, kExpLow = -746., kExpHigh = 710.;
  static constexpr double kLog[] = {0.666666666666673441, 0.399999999994146786, 0.285714287423875801, 0.222221985731883971,
                                    0.181835643259373019, 0.153140505564121588, 0.14795949660461129};  // [1.2e-18]
  static constexpr double kExp[] = {0.500000000000001072,   0.166666666666664102,   0.0416666666665291886,
                                    0.00833333333349562379, 0.00138888889439226396, 0.000198412695047653564,
                                    2.48014927627956486e-5, 2.75575873422038201e-6, 2.76303786208048037e-7,
                                    2.49999653432549359e-8};  // [4e-18]
};

template <class V>
using RealOf = typename Format<V>::Real;
template <class V>
constexpr int kWidth = KL_VECTOR_BYTES / sizeof(RealOf<V>);
template <class E>
using VectorOf = std::conditional_t<std::is_same_v<E, double>, vdouble, vfloat>;

template <class V>
KL_INLINE V all(RealOf<V> a) {
  return a - V{};  // 0 - -0 would lose the sign; a - 0 keeps it
}

template <class T>
KL_INLINE T read(const void* from) {
  T v;
  memcpy(&v, from, sizeof v);
  return v;
}

KL_INLINE vfloat load(const float* p) { return read<vfloat>(p); }
KL_INLINE vdouble load(const double* p) { return read<vdouble>(p); }
KL_INLINE vfloat load(const bfloat16* p) { return (vfloat)(__builtin_convertvector(read<vuint16>(p), vuint32) << 16); }
KL_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
KL_INLINE void store(double* p, vdouble v) { memcpy(p, &v, sizeof v); }
KL_INLINE void store(bfloat16* p, vfloat v) {
  const vuint32 bits = (vuint32)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const vuint16 low = __builtin_convertvector(v != v ? (vuint32{} + 0x7fc0) : rounded, vuint16);
  memcpy(p, &low, sizeof low);
}

// The masked forms: gcc 12 warns about its own header's unmasked ones.
#if KL_VECTOR_BYTES == 64
KL_INLINE vfloat load(const float16* p) { return (vfloat)_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(p)); }
KL_INLINE void store(float16* p, vfloat v) {
  const __m256i low = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &low, sizeof low);
}
#elif KL_VECTOR_BYTES == 32
KL_INLINE vfloat load(const float16* p) { return (vfloat)_mm256_cvtph_ps(read<__m128i>(p)); }
KL_INLINE void store(float16* p, vfloat v) {
  const __m128i low = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &low, sizeof low);
}
#else
KL_INLINE vfloat load(const float16* p) {
  const vint32 half = __builtin_convertvector(read<vuint16>(p), vint32), magnitude = half & 0x7fff;
  const vint32 normal = (magnitude << 13) + (112 << 23), special = normal + (112 << 23);
  const vint32 subnormal = (vint32)(__builtin_convertvector(magnitude, vfloat) * 0x1p-24f);
  const vint32 finite = magnitude < 0x400 ? subnormal : normal;
  return (vfloat)((magnitude < 0x7c00 ? finite : special) | (half & 0x8000) << 16);
}
// Round to nearest even. A subnormal is rounded by the adder: 0.5 has the unit in the last place that is wanted.
KL_INLINE void store(float16* p, vfloat v) {
  const vint32 bits = (vint32)v, magnitude = bits & 0x7fffffff;
  const vint32 normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  const vint32 subnormal = (vint32)((vfloat)magnitude + 0.5f) - 0x3f000000;
  const vint32 finite = magnitude < 0x38800000 ? subnormal : normal;
  const vint32 special = magnitude > 0x7f800000 ? (vint32{} + 0x7e00) : (vint32{} + 0x7c00);
  const vuint16 half = __builtin_convertvector((magnitude < 0x477ff000 ? finite : special) | (bits >> 16 & 0x8000), vuint16);
  memcpy(p, &half, sizeof half);
}
#endif

template <class V, int N>
KL_INLINE V polynomial(V x, const RealOf<V> (&c)[N]) {
  V sum = all<V>(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = madd(sum, x, all<V>(c[i]));
  return sum;
}

// log t to about 1 ulp; -inf at 0, NaN below. t = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt 2), s = f / (2 + f):
// log(1 + f) = 2 s + s^3 P(s^2) = f - f^2/2 + s (f^2/2 + s^2 P(s^2)), so that the leading term f is exact.
template <class V>
KL_INLINE V log_of(V t) {
  using F = Format<V>;
  using Bits = typename F::Bits;
  const V inf = all<V>(__builtin_inf()), nan = all<V>(__builtin_nan("")), zero{};
  const V lifted = t < F::kTiny ? t * F::kLift : t;
  const Bits bits = (Bits)lifted + (F::kOne - F::kSqrtHalf);
  // k + bias goes into the low bits of a number whose last place is 1: AVX2 cannot convert 64-bit integers
  const V biased = (V)((bits >> F::kMantissa) | F::kInteger) - F::kTwoToMantissa;
  const V k = biased - (t < F::kTiny ? all<V>(F::kBias + F::kLifted) : all<V>(F::kBias));
  const V f = (V)((bits & ((decltype(F::kOne){1} << F::kMantissa) - 1)) + F::kSqrtHalf) - 1;
  const V s = f / (2 + f), z = s * s, half_square = f * f * RealOf<V>(0.5);
  const V r = z * polynomial(z, F::kLog);
  const V low = madd(s, half_square + r, k * F::kLn2Low);
  const V value = madd(k, all<V>(F::kLn2High), f - (half_square - low));
  const V not_positive = t == zero ? -inf : nan;
  return t > zero ? (t < inf ? value : inf) : not_positive;
}

// e^x to about 1 ulp, subnormal results included: the power of two is applied in two steps.
template <class V>
KL_INLINE V exp_of(V x) {
  using F = Format<V>;
  using Bits = typename F::Bits;
  const V magic = all<V>(F::kMagic), low = all<V>(F::kExpLow), high = all<V>(F::kExpHigh);
  V c = x < low ? low : x;  // both comparisons are false for NaN, which therefore stays
  c = c > high ? high : c;
  const V n = madd(c, all<V>(1.44269504088896340736), magic) - magic;
  const V r = madd(n, all<V>(-F::kLn2Low), madd(n, all<V>(-F::kLn2High), c));
  const V p = 1 + madd(r * r, polynomial(r, F::kExp), r);
  const V half = (n * RealOf<V>(0.5) + magic) - magic;
  const Bits bias = (Bits)magic - F::kBias;
  return p * (V)(((Bits)(half + magic) - bias) << F::kMantissa) * (V)(((Bits)((n - half) + magic) - bias) << F::kMantissa);
}

template <bool kLog, class V>
KL_INLINE V element(V x, V t) {
  if constexpr (kLog) return exp_of(t) * (t - x);
  const V log_t = log_of(t);
  return madd(t, t == V{} ? V{} : log_t, -(t * x));
}

template <bool kLog, class E>
KL_INLINE void add_step(const E* x, const E* t, VectorOf<E>* sums) {
  constexpr int width = kWidth<VectorOf<E>>;
  for (int j = 0; j < kLanes / width; ++j) sums[j] += element<kLog>(load(x + j * width), load(t + j * width));
}

template <class E, bool kLog>
double sum_range(const void* input, const void* target, int64_t n) {
  using V = VectorOf<E>;
  constexpr int vectors = kLanes / kWidth<V>;
  const E* x = static_cast<const E*>(input);
  const E* t = static_cast<const E*>(target);
  double lanes[kLanes] = {};
  while (n > 0) {
    V sums[vectors] = {};
    int steps = 0;
    for (; steps < kStepsPerFold && n >= kLanes; ++steps, n -= kLanes, x += kLanes, t += kLanes) add_step<kLog>(x, t, sums);
    if (steps < kStepsPerFold && n > 0) {
      E last_x[kLanes] = {}, last_t[kLanes] = {};  // 0 against 0 contributes 0 in both forms
      memcpy(last_x, x, static_cast<size_t>(n) * sizeof(E));
      memcpy(last_t, t, static_cast<size_t>(n) * sizeof(E));
      add_step<kLog>(last_x, last_t, sums);
      n = 0;
    }
    RealOf<V> folded[kLanes];
    memcpy(folded, sums, sizeof folded);
    for (int k = 0; k < kLanes; ++k) lanes[k] += folded[k];
  }
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

template <class E, bool kLog, bool kInput, bool kTarget>
KL_INLINE void gradient_step(VectorOf<E> g, const E* x, const E* t, E* dx, E* dt) {
  using V = VectorOf<E>;
  const V target = load(t);
  V weight = target;
  if constexpr (kLog) weight = exp_of(target);
  if constexpr (kInput) store(dx, -g * weight);
  if constexpr (kTarget && kLog) store(dt, madd(g * (target - load(x)), weight, g * weight));
  if constexpr (kTarget && !kLog) {
    // t/t is NaN at 0 and at infinity and 1 elsewhere; torch's xlogy(0, t) is 0 even where log t is NaN
    const V nan = all<V>(__builtin_nan("")), zero{}, magnitude = target < zero ? -target : target;
    const V logged = g == zero ? (target == target ? zero : nan) : g * log_of(target);
    const V value = (logged + g) - g * load(x);
    store(dt, ((magnitude > zero) & (magnitude < all<V>(__builtin_inf()))) ? value : nan);
  }
}

template <class E, bool kLog, bool kInput, bool kTarget>
void gradient_range(double grad, const void* input, const void* target, void* input_grad, void* target_grad, int64_t n) {
  using V = VectorOf<E>;
  constexpr int width = kWidth<V>;
  const V g = all<V>(static_cast<RealOf<V>>(grad));
  const E* x = static_cast<const E*>(input);
  const E* t = static_cast<const E*>(target);
  E* dx = static_cast<E*>(input_grad);
  E* dt = static_cast<E*>(target_grad);
  int64_t i = 0;
  for (; i + width <= n; i += width)
    gradient_step<E, kLog, kInput, kTarget>(g, kTarget ? x + i : nullptr, t + i, kInput ? dx + i : nullptr,
                                            kTarget ? dt + i : nullptr);
  if (i == n) return;
  E last_x[width] = {}, last_t[width] = {}, last_dx[width], last_dt[width];
  const size_t rest = static_cast<size_t>(n - i) * sizeof(E);
  if (kTarget) memcpy(last_x, x + i, rest);
  memcpy(last_t, t + i, rest);
  gradient_step<E, kLog, kInput, kTarget>(g, last_x, last_t, last_dx, last_dt);
  if (kInput) memcpy(dx + i, last_dx, rest);
  if (kTarget) memcpy(dt + i, last_dt, rest);
}

#define KL_SUMS(E) {sum_range<E, false>, sum_range<E, true>}
#define KL_GRADIENTS(E, LOG) \
  {gradient_range<E, LOG, true, false>, gradient_range<E, LOG, false, true>, gradient_range<E, LOG, true, true>}
constexpr KlKernels kKernels = {{KL_SUMS(float), KL_SUMS(bfloat16), KL_SUMS(float16), KL_SUMS(double)},
                                {{KL_GRADIENTS(float, false), KL_GRADIENTS(float, true)},
                                 {KL_GRADIENTS(bfloat16, false), KL_GRADIENTS(bfloat16, true)},
                                 {KL_GRADIENTS(float16, false), KL_GRADIENTS(float16, true)},
                                 {KL_GRADIENTS(double, false), KL_GRADIENTS(double, true)}}};

}  // namespace

#undef KL_SUMS
#undef KL_GRADIENTS
#undef KL_INLINE
