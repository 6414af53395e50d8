// 256-bit vectors: AVX2, FMA and F16C, no VNNI. Included only by isa/avx2.cpp, inside its anonymous namespace.
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
constexpr int kRadixBits8 = 7;  // vpmaddubsw saturates at 16 bits: 2 * 255 * 64 still fits

using F = __m256;
using I = __m256i;
using B = __m256i;

inline F f_load(const float* p) { return _mm256_loadu_ps(p); }
inline void f_store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F f_set(float x) { return _mm256_set1_ps(x); }
inline F f_add(F a, F b) { return _mm256_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm256_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F f_max(F a, F b) { return _mm256_max_ps(a, b); }
inline F f_abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline F f_max_abs(F a, F b) { return f_max(f_abs(a), f_abs(b)); }
inline F f_max_positive(F a, F b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline F f_round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F f_from(I a) { return _mm256_cvtepi32_ps(a); }
inline float f_reduce_max(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline float f_reduce_add(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
template <int ROWS>
inline void f_reduce_max_rows(const F (&v)[ROWS], float* out) {
  for (int r = 0; r < ROWS; ++r) out[r] = f_reduce_max(v[r]);
}
template <int ROWS>
inline void f_reduce_max_positive_rows(const F (&v)[ROWS], float* out) {
  for (int r = 0; r < ROWS; ++r) {
    const __m256i bits = _mm256_castps_si256(v[r]);
    __m128i x = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    out[r] = _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1))));
  }
}
template <int ROWS>
inline void f_reduce_add_rows(const F (&v)[ROWS], float* out) {
  for (int r = 0; r < ROWS; ++r) out[r] = f_reduce_add(v[r]);
}
inline F f_keep_if_ge(F x, float bound, F a) {
  return _mm256_and_ps(_mm256_cmp_ps(x, _mm256_set1_ps(bound), _CMP_GE_OQ), a);
}
inline F f_scale2_from(F a, F n, float least) {
  const __m256i power =
      _mm256_add_epi32(_mm256_cvtps_epi32(_mm256_max_ps(n, _mm256_set1_ps(-126.0f))), _mm256_set1_epi32(127));
  return _mm256_and_ps(_mm256_cmp_ps(n, _mm256_set1_ps(least), _CMP_NLT_UQ),
                       _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23))));
}
inline F f_load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F f_load_scale8(const uint8_t* p) {
  const __m128i halves = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtph_ps(_mm_slli_epi16(halves, 7));
}
inline F f_load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}

inline I i_zero() { return _mm256_setzero_si256(); }
inline I i_round(F a) { return _mm256_cvtps_epi32(a); }
inline I i_add(I a, I b) { return _mm256_add_epi32(a, b); }
inline I i_sub(I a, I b) { return _mm256_sub_epi32(a, b); }
inline I i_set(int32_t x) { return _mm256_set1_epi32(x); }
template <int N>
inline I i_sra(I a) {
  return _mm256_srai_epi32(a, N);
}
template <int N>
inline I i_sll(I a) {
  return _mm256_slli_epi32(a, N);
}
template <bool SIGNED>
inline void i_store_bytes(uint8_t* p, const I (&a)[1]) {
  const __m256i low =
      _mm256_shuffle_epi8(a[0], _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8,
                                                 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const int32_t words[2] = {_mm256_extract_epi32(low, 0), _mm256_extract_epi32(low, 4)};
  __builtin_memcpy(p, words, 8);
}
using W = __m256i;
inline W w_load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void w_store(uint8_t* p, W a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline W w_mul(W a, W b) { return _mm256_mulhrs_epi16(a, b); }
inline void w_pack(const I (&q)[4], W (&out)[2]) {
  const W a = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
  const W b = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[2], q[3]), 0xd8);
  out[0] = _mm256_permute2x128_si256(a, b, 0x20);
  out[1] = _mm256_permute2x128_si256(a, b, 0x31);
}
template <int RADIX>
inline void w_store_terms(uint8_t* high, uint8_t* low, const W (&x)[2]) {
  W upper[2], lower[2];
  for (int i = 0; i < 2; ++i) {
    upper[i] = _mm256_srai_epi16(_mm256_add_epi16(x[i], _mm256_set1_epi16(1 << (RADIX - 1))), RADIX);
    lower[i] = _mm256_sub_epi16(x[i], _mm256_slli_epi16(upper[i], RADIX));
  }
  w_store(high, _mm256_packs_epi16(upper[0], upper[1]));
  w_store(low, _mm256_packs_epi16(lower[0], lower[1]));
}
inline I i_dot(I sum, B u, B s) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}

inline B b_load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline B b_quad(const uint8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
inline B b_or(B a, B b) { return _mm256_or_si256(a, b); }
template <int RIGHT, int MASK>
inline B b_extract(B a) {
  if constexpr (RIGHT > 0) a = _mm256_srli_epi16(a, RIGHT);
  if constexpr (RIGHT < 0) a = _mm256_slli_epi16(a, -RIGHT);
  return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(MASK)));
}
template <int MASK>
inline B b_flip(B a) {
  return MASK == 0 ? a : _mm256_xor_si256(a, _mm256_set1_epi8(static_cast<char>(MASK)));
}
inline B b_lookup(const uint8_t* table, B i) {
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), i);
}
inline F b_even(B a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
inline F b_odd(B a) {
  return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
template <int ELEMENT, int SHIFT>
inline F b_float8(B a) {
  if constexpr (ELEMENT < 3) a = _mm256_slli_epi32(a, 24 - 8 * ELEMENT);
  const uint32_t kept = 0x80000000u | (0x7fu << SHIFT);
  return _mm256_castsi256_ps(
      _mm256_and_si256(_mm256_srai_epi32(a, 24 - SHIFT), _mm256_set1_epi32(static_cast<int>(kept))));
}
