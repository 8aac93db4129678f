// Each intrinsic that csrc/cpu uses, applied to x, y and z; out has a vector per line of tests/test_avx512_emulated.py's table.
// Included inside two namespaces: with the emulated intrinsics, and with the compiler's own.

static void keep(uint32_t*& out, __m512 v) {
  _mm512_storeu_ps(out, v);
  out += 16;
}
static void keep(uint32_t*& out, __m512i v) {
  _mm512_storeu_si512(out, v);
  out += 16;
}
static void keep(uint32_t*& out, float v) { keep(out, _mm512_set1_ps(v)); }
static void keep(uint32_t*& out, __mmask16 v) { keep(out, _mm512_set1_epi32(v)); }

static void apply(const float* at_x, const float* at_y, const float* at_z, uint32_t* out) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 x = _mm512_loadu_ps(at_x), y = _mm512_loadu_ps(at_y), z = _mm512_loadu_ps(at_z);
  const __m512i i = _mm512_castps_si512(x), j = _mm512_load_si512(at_y);
  const __mmask16 m = _mm512_cmp_ps_mask(x, y, _CMP_LE_OQ);
  keep(out, _mm512_fmadd_ps(x, y, z));
  keep(out, _mm512_fnmadd_ps(x, y, z));
  keep(out, _mm512_max_ps(x, y));
  keep(out, _mm512_min_ps(x, y));
  keep(out, _mm512_abs_ps(x));
  keep(out, _mm512_range_ps(x, y, 0x0b));
  keep(out, _mm512_roundscale_ps(x, kNearest));
  keep(out, _mm512_reduce_ps(x, 0x09));
  keep(out, _mm512_scalef_ps(x, y));
  keep(out, _mm512_getexp_ps(x));
  keep(out, _mm512_reduce_add_ps(x));
  keep(out, _mm512_reduce_max_ps(x));
  keep(out, _mm512_cmp_ps_mask(x, y, _CMP_EQ_OQ));
  keep(out, m);
  keep(out, _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q));
  keep(out, static_cast<__mmask16>(_mm512_kortestc(m, _mm512_cmp_ps_mask(y, x, _CMP_LE_OQ))));
  keep(out, _mm512_mask_mov_ps(x, m, y));
  keep(out, _mm512_maskz_mov_ps(m, x));
  keep(out, _mm512_mask_mov_epi32(i, m, j));
  keep(out, _mm512_mask_mov_epi16(i, 0xaaaaaaaau, j));
  keep(out, _mm512_add_epi32(i, j));
  keep(out, _mm512_and_si512(i, j));
  keep(out, _mm512_slli_epi32(i, 16));
  keep(out, _mm512_srli_epi32(i, 16));
  keep(out, _mm512_permutexvar_epi16(i, j));
  alignas(64) __m256i halves[2] = {_mm512_cvtps_ph(x, kNearest), _mm512_maskz_cvtps_ph(0xffff, y, kNearest)};
  keep(out, _mm512_load_si512(halves));
  __m256i half;
  memcpy(&half, at_x, sizeof half);
  keep(out, _mm512_cvtph_ps(half));
  keep(out, _mm512_maskz_cvtph_ps(0xffff, half));
  __m512d d;
  memcpy(&d, at_x, sizeof d);
  d = _mm512_fmadd_pd(d, d, d);
  memcpy(out, &d, sizeof d);
}

static void apply_bf16(const float* at_x, const float* at_y, uint32_t* out) {
  keep(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(at_x), _mm512_loadu_ps(at_y)));
}
