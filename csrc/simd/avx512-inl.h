// 512-bit vectors: AVX-512 F/BW/VL/DQ and VNNI. Included only by isa/avx512.cpp, inside its anonymous namespace.
constexpr int kWidth = 16;  // 32-bit lanes in a vector
constexpr int kRegisters = 32;
constexpr int kRadixBits8 = 8;  // bits of one term of the small operand beside 8-bit codes

using F = __m512;   // float lanes
using I = __m512i;  // int32 lanes
using B = __m512i;  // 4 bytes a lane

inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F f_set(float x) { return _mm512_set1_ps(x); }
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_abs(F a) { return _mm512_abs_ps(a); }
inline F f_max_abs(F a, F b) { return _mm512_range_ps(a, b, 0xb); }  // the larger magnitude, without its sign
// The larger of numbers that are not negative; NaN where either is one without a sign. By their bits, which are in the
// same order (-0 is the least).
inline F f_max_positive(F a, F b) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline F f_round(F a) { return _mm512_roundscale_ps(a, 0); }
inline F f_from(I a) { return _mm512_cvtepi32_ps(a); }
inline float f_reduce_max(F a) { return _mm512_reduce_max_ps(a); }
inline float f_reduce_add(F a) { return _mm512_reduce_add_ps(a); }
// Four vectors' lanes combined to one number each, in the same order whatever the other three hold. Rows past ROWS may
// be undefined.
template <class Combine>
inline void reduce_four(F a, F b, F c, F d, Combine combine, float* out) {
  const F ab = combine(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const F cd = combine(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  F x = combine(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  x = combine(x, _mm512_permute_ps(x, 0x4e));
  x = combine(x, _mm512_permute_ps(x, 0xb1));
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, x)));
}
// out[0..3] (only the first ROWS are meaningful)
template <int ROWS>
inline void f_reduce_max_rows(const F (&v)[ROWS], float* out) {
  reduce_four(v[0], v[ROWS > 1 ? 1 : 0], v[ROWS > 2 ? 2 : 0], v[ROWS > 3 ? 3 : 0], f_max, out);
}
template <int ROWS>
inline void f_reduce_max_positive_rows(const F (&v)[ROWS], float* out) {
  reduce_four(v[0], v[ROWS > 1 ? 1 : 0], v[ROWS > 2 ? 2 : 0], v[ROWS > 3 ? 3 : 0], f_max_positive, out);
}
template <int ROWS>
inline void f_reduce_add_rows(const F (&v)[ROWS], float* out) {
  reduce_four(v[0], v[ROWS > 1 ? 1 : 0], v[ROWS > 2 ? 2 : 0], v[ROWS > 3 ? 3 : 0], f_add, out);
}
// a where x >= bound, 0 elsewhere.
inline F f_keep_if_ge(F x, float bound, F a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_GE_OQ), a);
}
// a * 2^n for integral n <= 127; 0 where n < least, a where n is NaN, which a then must be too.
inline F f_scale2_from(F a, F n, float least) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n, _mm512_set1_ps(least), _CMP_NLT_UQ), a, n);
}
inline F f_load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Scales of one byte (scale8_from_float).
inline F f_load_scale8(const uint8_t* p) {
  const __m256i halves = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtph_ps(_mm256_slli_epi16(halves, 7));
}
inline F f_load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

inline I i_zero() { return _mm512_setzero_si512(); }
inline I i_round(F a) { return _mm512_cvtps_epi32(a); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I i_set(int32_t x) { return _mm512_set1_epi32(x); }
template <int N>
inline I i_sra(I a) {
  return _mm512_srai_epi32(a, N);
}
template <int N>
inline I i_sll(I a) {
  return _mm512_slli_epi32(a, N);
}
// The low byte of each lane, in order.
template <bool SIGNED>
inline void i_store_bytes(uint8_t* p, const I (&a)[1]) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a[0]));
}
// Four vectors whose lanes fit a byte of that kind: packing takes them to halves and then bytes within 128-bit lanes.
template <bool SIGNED>
inline void i_store_bytes(uint8_t* p, const I (&a)[4]) {
  const __m512i low = _mm512_packs_epi32(a[0], a[1]), high = _mm512_packs_epi32(a[2], a[3]);
  const __m512i bytes = SIGNED ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
}
// The same four vectors, whose lanes fit 16 bits of that kind, as high and low bytes: lane = 256 high + low.
template <bool SIGNED>
inline void i_store_byte_pairs(uint8_t* high, uint8_t* low, const I (&q)[4]) {
  const auto halves = [](I a, I b) { return SIGNED ? _mm512_packs_epi32(a, b) : _mm512_packus_epi32(a, b); };
  const auto bytes = [](I a, I b) { return SIGNED ? _mm512_packs_epi16(a, b) : _mm512_packus_epi16(a, b); };
  const auto upper = [](I a) {
    return SIGNED ? _mm512_srai_epi16(_mm512_add_epi16(a, _mm512_set1_epi16(128)), 8) : _mm512_srli_epi16(a, 8);
  };
  // The low byte of a signed lane is already the signed rest.
  const auto lower = [](I a) { return _mm512_and_si512(a, _mm512_set1_epi16(255)); };
  const I a = halves(q[0], q[1]), b = halves(q[2], q[3]);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, bytes(upper(a), upper(b))));
  _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(lower(a), lower(b))));
}
// Vectors of 16-bit lanes, two for each four vectors of integers, in the order that `w_store_terms` stores in order.
using W = __m512i;
inline W w_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void w_store(uint8_t* p, W a) { _mm512_storeu_si512(p, a); }
inline W w_mul(W a, W b) { return _mm512_mulhrs_epi16(a, b); }  // a * b / 2^15, rounded
inline void w_pack(const I (&q)[4], W (&out)[2]) {
  const I a = _mm512_packs_epi32(q[0], q[1]), b = _mm512_packs_epi32(q[2], q[3]);
  out[0] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 2, 1, 3, 8, 10, 9, 11), b);
  out[1] = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 6, 5, 7, 12, 14, 13, 15), b);
}
// Signed bytes: lane = 2^RADIX high + low.
template <int RADIX>
inline void w_store_terms(uint8_t* high, uint8_t* low, const W (&x)[2]) {
  static_assert(RADIX == 8);
  const auto upper = [](W a) { return _mm512_srai_epi16(_mm512_add_epi16(a, _mm512_set1_epi16(128)), 8); };
  const auto lower = [](W a) { return _mm512_and_si512(a, _mm512_set1_epi16(255)); };
  _mm512_storeu_si512(high, _mm512_packs_epi16(upper(x[0]), upper(x[1])));
  _mm512_storeu_si512(low, _mm512_packus_epi16(lower(x[0]), lower(x[1])));
}
// Lane sums of four products of unsigned and signed bytes.
// Assembly, because GCC 12 gives the intrinsic's result another register than its sum: copies and spills in every loop.
inline I i_dot(I sum, B u, B s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
  return sum;
}

inline B b_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline B b_quad(const uint8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
inline B b_or(B a, B b) { return _mm512_or_si512(a, b); }
// ((a >> RIGHT) & MASK) of every byte; a negative RIGHT shifts left.
template <int RIGHT, int MASK>
inline B b_extract(B a) {
  if constexpr (RIGHT > 0) a = _mm512_srli_epi16(a, RIGHT);
  if constexpr (RIGHT < 0) a = _mm512_slli_epi16(a, -RIGHT);
  return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(MASK)));
}
template <int MASK>
inline B b_flip(B a) {
  return MASK == 0 ? a : _mm512_xor_si512(a, _mm512_set1_epi8(static_cast<char>(MASK)));
}
// table[i] for every byte i < 16.
inline B b_lookup(const uint8_t* table, B i) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table))), i);
}
// The two bfloat16 of each lane as floats.
inline F b_even(B a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
inline F b_odd(B a) {
  return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
// The ELEMENT-th byte of each lane as a float whose exponent and mantissa begin at bit SHIFT (codecs/float8-inl.h).
template <int ELEMENT, int SHIFT>
inline F b_float8(B a) {
  if constexpr (ELEMENT < 3) a = _mm512_slli_epi32(a, 24 - 8 * ELEMENT);
  const uint32_t kept = 0x80000000u | (0x7fu << SHIFT);
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_srai_epi32(a, 24 - SHIFT), _mm512_set1_epi32(static_cast<int>(kept))));
}
