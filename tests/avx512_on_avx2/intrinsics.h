// The AVX-512 intrinsics of csrc/cpu, for machines without them: in AVX2 where its instruction is the half of one, else as Intel
// defines them. Included inside a namespace, after <immintrin.h>, by code for avx2, fma and f16c: names declared here hide those
// of the system. MXCSR's "denormals are zero" and "flush to zero" hold, as the kernels set them; its rounding is to nearest.
// What an immediate could say beyond what is emulated traps.

// Macros in some headers, depending on the compiler and its optimisation, which no namespace hides.
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_getexp_ps
#undef _mm512_maskz_cvtps_ph
#undef _mm512_range_ps
#undef _mm512_reduce_ps
#undef _mm512_roundscale_ps
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef double __m512d __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));

#define ON_AVX2 __attribute__((always_inline)) static inline
// Not inlined: the kernels, which are, would take the compiler minutes.
#define ON_AVX2_CALLED __attribute__((noinline, unused)) static

namespace on_avx2 {

typedef unsigned Words __attribute__((vector_size(64), may_alias));
typedef int Lanes __attribute__((vector_size(64), may_alias));

ON_AVX2 void require(bool emulated) {
  if (!emulated) __builtin_trap();
}

template <class Whole>
ON_AVX2 Whole read(const void* from) {
  Whole v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class Half, class Whole>
ON_AVX2 Half half(const Whole& v, int which) {
  return read<Half>(reinterpret_cast<const char*>(&v) + 32 * which);
}

template <class Whole, class Half>
ON_AVX2 Whole join(Half low, Half high) {
  const Half halves[] = {low, high};
  return read<Whole>(halves);
}

template <class F, class... V>
ON_AVX2 __m512 by_halves(F f, V... v) {
  return join<__m512>(f(half<__m256>(v, 0)...), f(half<__m256>(v, 1)...));
}

ON_AVX2 Lanes lanes_of(__mmask16 m) {
  const Lanes bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (bit & m) != 0;
}

ON_AVX2 __m256 bits(unsigned v) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(v))); }
ON_AVX2 __m256 magnitude(__m256 a) { return _mm256_andnot_ps(bits(0x80000000), a); }
ON_AVX2 __m256 quiet(__m256 nan) { return _mm256_or_ps(nan, bits(0x00400000)); }
ON_AVX2 __m256 is(__m256 a, float v) { return _mm256_cmp_ps(a, _mm256_set1_ps(v), _CMP_EQ_OQ); }
ON_AVX2 __m256 is_nan(__m256 a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
ON_AVX2 __m256 has_quiet_bit(__m256 a) {  // in integers: a comparison would take that bit alone for a denormal, for 0
  return _mm256_castsi256_ps(_mm256_srai_epi32(_mm256_slli_epi32(_mm256_castps_si256(a), 9), 31));
}
ON_AVX2 __m256 is_quiet_nan(__m256 a) { return _mm256_and_ps(has_quiet_bit(a), is_nan(a)); }
ON_AVX2 __m256 is_signalling(__m256 a) { return _mm256_andnot_ps(has_quiet_bit(a), is_nan(a)); }
ON_AVX2 __m256 where(__m256 m, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, m); }

// a 2^k for integral k. In double the product is exact: the one rounding, also to denormals, is that of the way back, and both
// conversions obey MXCSR as the instruction does.
ON_AVX2 __m128 scaled(__m128 a, __m128 k) {
  const __m256i biased = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm_cvtps_epi32(k)), _mm256_set1_epi64x(1023));
  return _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_cvtps_pd(a), _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52))));
}

ON_AVX2 __m256 scalef(__m256 a, __m256 b) {
  // 400 takes the smallest number past the largest
  const __m256 limit = _mm256_set1_ps(400.f), zero = _mm256_setzero_ps();
  const __m256 k = _mm256_max_ps(_mm256_min_ps(_mm256_floor_ps(b), limit), _mm256_sub_ps(zero, limit));
  const __m128 low = scaled(_mm256_castps256_ps128(a), _mm256_castps256_ps128(k));
  const __m128 high = scaled(_mm256_extractf128_ps(a, 1), _mm256_extractf128_ps(k, 1));
  __m256 r = _mm256_set_m128(high, low);
  const __m256 up = is(b, INFINITY), down = is(b, -INFINITY);
  const __m256 undefined = _mm256_or_ps(_mm256_and_ps(is(a, 0), up), _mm256_and_ps(is(magnitude(a), INFINITY), down));
  r = where(undefined, bits(0xffc00000), r);
  r = where(_mm256_andnot_ps(is_nan(a), is_nan(b)), quiet(b), r);
  // an infinite exponent wins over a quiet NaN
  r = where(_mm256_and_ps(is_quiet_nan(a), up), b, r);
  return where(_mm256_and_ps(is_quiet_nan(a), down), zero, r);
}

ON_AVX2 __m256 getexp(__m256 a) {
  const __m256 m = magnitude(a), denormal = _mm256_cmp_ps(m, _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
  const __m256 normal = where(denormal, _mm256_mul_ps(m, _mm256_set1_ps(0x1p24f)), m);
  const __m256i field = _mm256_srli_epi32(_mm256_castps_si256(normal), 23);
  const __m256 bias = where(denormal, _mm256_set1_ps(127 + 24), _mm256_set1_ps(127));
  __m256 r = _mm256_sub_ps(_mm256_cvtepi32_ps(field), bias);
  r = where(is(a, 0), _mm256_set1_ps(-INFINITY), r);
  r = where(is(m, INFINITY), m, r);
  return where(is_nan(a), quiet(a), r);
}

// The larger magnitude, its sign cleared. One quiet NaN gives the other operand, two the first; a signalling one is an answer.
ON_AVX2 __m256 largest_magnitude(__m256 a, __m256 b) {
  const __m256 x = magnitude(where(is(a, 0), _mm256_setzero_ps(), a)), y = magnitude(where(is(b, 0), _mm256_setzero_ps(), b));
  const __m256 second = _mm256_or_ps(_mm256_cmp_ps(x, y, _CMP_LE_OQ), _mm256_andnot_ps(is_nan(y), is_nan(x)));
  const __m256 r = where(is_signalling(b), quiet(b), where(second, y, x));
  return where(is_signalling(a), quiet(a), r);
}

// a - floor(a), the difference rounded down too: below 1 even for a = -1e-9, and -0 where nothing is left.
ON_AVX2 __m256 fraction(__m256 a) {
  const __m256 whole = _mm256_floor_ps(a), nearest = _mm256_sub_ps(a, whole);
  const __m256 error = _mm256_sub_ps(a, _mm256_add_ps(nearest, whole));  // exact: |whole| >= |a|, or nothing was rounded
  const __m256i too_high = _mm256_castps_si256(_mm256_cmp_ps(error, _mm256_setzero_ps(), _CMP_LT_OQ));
  __m256 r = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(nearest), too_high));
  r = where(is(r, 0), bits(0x80000000), r);
  return where(is(magnitude(a), INFINITY), _mm256_setzero_ps(), r);
}

// Round to nearest even whatever MXCSR says; denormals become 0, a NaN keeps its upper bits.
ON_AVX2 uint16_t to_bf16(uint32_t v) {
  const uint32_t m = v & 0x7fffffff;
  if (m < 0x00800000) return static_cast<uint16_t>(v >> 16 & 0x8000);
  if (m > 0x7f800000) return static_cast<uint16_t>(v >> 16 | 0x40);
  return static_cast<uint16_t>((v + 0x7fff + (v >> 16 & 1)) >> 16);
}

}  // namespace on_avx2

ON_AVX2 __m512 _mm512_set1_ps(float v) { return __m512{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
ON_AVX2 __m512i _mm512_set1_epi32(int v) { return (__m512i)(on_avx2::Lanes{} + v); }
ON_AVX2 __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
ON_AVX2 __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }

ON_AVX2 __m512 _mm512_loadu_ps(const void* p) { return on_avx2::read<__m512>(p); }
ON_AVX2 __m512i _mm512_loadu_si512(const void* p) { return on_avx2::read<__m512i>(p); }
ON_AVX2_CALLED __m512i _mm512_load_si512(const void* p) {
  on_avx2::require(reinterpret_cast<uintptr_t>(p) % 64 == 0);
  return on_avx2::read<__m512i>(p);
}
ON_AVX2 void _mm512_storeu_ps(void* p, __m512 a) { memcpy(p, &a, sizeof a); }
ON_AVX2 void _mm512_storeu_si512(void* p, __m512i a) { memcpy(p, &a, sizeof a); }

ON_AVX2_CALLED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return on_avx2::by_halves([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
ON_AVX2_CALLED __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) {
  return on_avx2::by_halves([](__m256 x, __m256 y, __m256 z) { return _mm256_fnmadd_ps(x, y, z); }, a, b, c);
}
ON_AVX2_CALLED __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  auto part = [&](int i) {
    return _mm256_fmadd_pd(on_avx2::half<__m256d>(a, i), on_avx2::half<__m256d>(b, i), on_avx2::half<__m256d>(c, i));
  };
  return on_avx2::join<__m512d>(part(0), part(1));
}

// The second operand where one is NaN or both are zeros, as in AVX.
ON_AVX2_CALLED __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return on_avx2::by_halves([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}
ON_AVX2_CALLED __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return on_avx2::by_halves([](__m256 x, __m256 y) { return _mm256_min_ps(x, y); }, a, b);
}
ON_AVX2_CALLED __m512 _mm512_abs_ps(__m512 a) { return on_avx2::by_halves(on_avx2::magnitude, a); }
ON_AVX2_CALLED __m512 _mm512_scalef_ps(__m512 a, __m512 b) { return on_avx2::by_halves(on_avx2::scalef, a, b); }
ON_AVX2_CALLED __m512 _mm512_getexp_ps(__m512 a) { return on_avx2::by_halves(on_avx2::getexp, a); }
ON_AVX2_CALLED __m512 _mm512_range_ps(__m512 a, __m512 b, int what) {
  on_avx2::require(what == 0x0b);  // of magnitudes the maximum, without a sign
  return on_avx2::by_halves(on_avx2::largest_magnitude, a, b);
}
ON_AVX2_CALLED __m512 _mm512_reduce_ps(__m512 a, int what) {
  on_avx2::require(what == 0x09);  // no bits kept, down, no exceptions
  return on_avx2::by_halves(on_avx2::fraction, a);
}
ON_AVX2_CALLED __m512 _mm512_roundscale_ps(__m512 a, int what) {
  on_avx2::require(what == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  return on_avx2::by_halves([](__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }, a);
}

// The trees of gcc's header: of a maximum, the order of operands decides between NaN and number.
ON_AVX2_CALLED float _mm512_reduce_add_ps(__m512 a) {
  const __m256 of2 = _mm256_add_ps(on_avx2::half<__m256>(a, 1), on_avx2::half<__m256>(a, 0));
  const __m128 of4 = _mm_add_ps(_mm256_extractf128_ps(of2, 1), _mm256_castps256_ps128(of2));
  const __m128 of8 = _mm_add_ps(of4, _mm_shuffle_ps(of4, of4, _MM_SHUFFLE(1, 0, 3, 2)));
  return of8[0] + of8[1];
}
ON_AVX2_CALLED float _mm512_reduce_max_ps(__m512 a) {
  const __m256 of2 = _mm256_max_ps(on_avx2::half<__m256>(a, 1), on_avx2::half<__m256>(a, 0));
  const __m128 of4 = _mm_max_ps(_mm256_extractf128_ps(of2, 1), _mm256_castps256_ps128(of2));
  const __m128 of8 = _mm_max_ps(of4, _mm_shuffle_ps(of4, of4, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm_cvtss_f32(_mm_max_ps(of8, _mm_shuffle_ps(of8, of8, _MM_SHUFFLE(0, 1, 0, 1))));
}

ON_AVX2_CALLED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  on_avx2::require(predicate == _CMP_EQ_OQ || predicate == _CMP_LE_OQ || predicate == _CMP_UNORD_Q);
  const on_avx2::Lanes found = predicate == _CMP_EQ_OQ ? a == b : predicate == _CMP_LE_OQ ? a <= b : (a != a) | (b != b);
  const int low = _mm256_movemask_ps(on_avx2::half<__m256>(found, 0)), high = _mm256_movemask_ps(on_avx2::half<__m256>(found, 1));
  return static_cast<__mmask16>(low | high << 8);
}
ON_AVX2 unsigned char _mm512_kortestc(__mmask16 a, __mmask16 b) { return (a | b) == 0xffff; }
ON_AVX2_CALLED __m512 _mm512_mask_mov_ps(__m512 otherwise, __mmask16 m, __m512 a) { return on_avx2::lanes_of(m) ? a : otherwise; }
ON_AVX2_CALLED __m512 _mm512_maskz_mov_ps(__mmask16 m, __m512 a) { return on_avx2::lanes_of(m) ? a : __m512{}; }
ON_AVX2_CALLED __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 m, __m512i a) {
  return (__m512i)(on_avx2::lanes_of(m) ? (on_avx2::Lanes)a : (on_avx2::Lanes)otherwise);
}
ON_AVX2_CALLED __m512i _mm512_mask_mov_epi16(__m512i otherwise, __mmask32 m, __m512i a) {
  __m512bh r = (__m512bh)otherwise;
  for (int k = 0; k < 32; k++)
    if (m >> k & 1) r[k] = ((__m512bh)a)[k];
  return (__m512i)r;
}

ON_AVX2_CALLED __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((on_avx2::Words)a + (on_avx2::Words)b); }
ON_AVX2 __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
ON_AVX2_CALLED __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return (__m512i)((on_avx2::Words)a << n); }
ON_AVX2_CALLED __m512i _mm512_srli_epi32(__m512i a, unsigned n) { return (__m512i)((on_avx2::Words)a >> n); }
ON_AVX2_CALLED __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) {
  __m512bh r{};
  for (int k = 0; k < 32; k++) r[k] = ((__m512bh)a)[((__m512bh)index)[k] & 31];
  return (__m512i)r;
}

ON_AVX2_CALLED __m512 _mm512_cvtph_ps(__m256i a) {
  return on_avx2::join<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
ON_AVX2_CALLED __m256i _mm512_cvtps_ph(__m512 a, int what) {
  on_avx2::require(what == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const __m128i low = _mm256_cvtps_ph(on_avx2::half<__m256>(a, 0), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i high = _mm256_cvtps_ph(on_avx2::half<__m256>(a, 1), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_set_m128i(high, low);
}
ON_AVX2 __m512 _mm512_maskz_cvtph_ps(__mmask16 m, __m256i a) {
  on_avx2::require(m == 0xffff);
  return _mm512_cvtph_ps(a);
}
ON_AVX2 __m256i _mm512_maskz_cvtps_ph(__mmask16 m, __m512 a, int what) {
  on_avx2::require(m == 0xffff);
  return _mm512_cvtps_ph(a, what);
}
// The first operand goes to the upper half.
ON_AVX2_CALLED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  __m512bh r{};
  for (int k = 0; k < 16; k++) {
    r[k] = static_cast<short>(on_avx2::to_bf16(((on_avx2::Words)low)[k]));
    r[k + 16] = static_cast<short>(on_avx2::to_bf16(((on_avx2::Words)high)[k]));
  }
  return r;
}
