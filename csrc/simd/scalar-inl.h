// One lane, portable C++: the fall-back for every processor without a vector unit that we know (ARM included).
// Included only by isa/scalar.cpp, inside its anonymous namespace.
constexpr int kWidth = 1;
constexpr int kRegisters = 16;
constexpr int kRadixBits8 = 8;

using F = float;
using I = int32_t;
using B = uint32_t;  // four bytes, the first in the low bits

inline F f_load(const float* p) { return *p; }
inline void f_store(float* p, F v) { *p = v; }
inline F f_set(float x) { return x; }
inline F f_add(F a, F b) { return a + b; }
inline F f_sub(F a, F b) { return a - b; }
inline F f_mul(F a, F b) { return a * b; }
inline F f_div(F a, F b) { return a / b; }
inline F f_fma(F a, F b, F c) { return a * b + c; }
inline F f_max(F a, F b) { return a > b ? a : b; }
inline F f_abs(F a) { return a < 0 ? -a : a; }
inline F f_max_abs(F a, F b) { return f_max(f_abs(a), f_abs(b)); }
inline F f_max_positive(F a, F b) { return a > b || a != a ? a : b; }
inline F f_round(F a) { return __builtin_nearbyintf(a); }
inline F f_from(I a) { return static_cast<float>(a); }
inline float f_reduce_max(F a) { return a; }
inline float f_reduce_add(F a) { return a; }
template <int ROWS>
inline void f_reduce_max_rows(const F (&v)[ROWS], float* out) {
  for (int r = 0; r < ROWS; ++r) out[r] = f_reduce_max(v[r]);
}
template <int ROWS>
inline void f_reduce_max_positive_rows(const F (&v)[ROWS], float* out) {
  for (int r = 0; r < ROWS; ++r) out[r] = v[r];
}
template <int ROWS>
inline void f_reduce_add_rows(const F (&v)[ROWS], float* out) {
  for (int r = 0; r < ROWS; ++r) out[r] = f_reduce_add(v[r]);
}
inline F f_keep_if_ge(F x, float bound, F a) { return x >= bound ? a : 0.0f; }
inline F f_scale2_from(F a, F n, float least) {
  if (!(n >= least)) return n < least ? 0.0f : a;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return a * power;
}
inline F f_load_half(const uint16_t* p) { return half_to_float(*p); }
inline F f_load_scale8(const uint8_t* p) { return half_to_float(static_cast<uint16_t>(*p << 7)); }
inline F f_load_bf16(const uint16_t* p) { return bf16_to_float(*p); }

inline I i_zero() { return 0; }
inline I i_round(F a) { return static_cast<int32_t>(__builtin_lrintf(a)); }
inline I i_add(I a, I b) { return a + b; }
inline I i_sub(I a, I b) { return a - b; }
inline I i_set(int32_t x) { return x; }
template <int N>
inline I i_sra(I a) {
  return a >> N;
}
template <int N>
inline I i_sll(I a) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) << N);
}
template <bool SIGNED>
inline void i_store_bytes(uint8_t* p, const I (&a)[1]) {
  *p = static_cast<uint8_t>(a[0]);
}
struct W {
  int16_t lane[2];
};
inline W w_load(const uint8_t* p) {
  W a;
  __builtin_memcpy(a.lane, p, 4);
  return a;
}
inline void w_store(uint8_t* p, W a) { __builtin_memcpy(p, a.lane, 4); }
inline W w_mul(W a, W b) {
  const auto product = [&](int i) { return static_cast<int16_t>((a.lane[i] * b.lane[i] + (1 << 14)) >> 15); };
  return {{product(0), product(1)}};
}
inline void w_pack(const I (&q)[4], W (&out)[2]) {
  const auto word = [&](int i) {
    return static_cast<int16_t>(q[i] > INT16_MAX ? INT16_MAX : q[i] < INT16_MIN ? INT16_MIN : q[i]);
  };
  out[0] = {{word(0), word(1)}};
  out[1] = {{word(2), word(3)}};
}
template <int RADIX>
inline void w_store_terms(uint8_t* high, uint8_t* low, const W (&x)[2]) {
  for (int i = 0; i < 4; ++i) {
    const int word = x[i / 2].lane[i % 2], upper = (word + (1 << (RADIX - 1))) >> RADIX;
    high[i] = static_cast<uint8_t>(upper);
    low[i] = static_cast<uint8_t>(word - upper * (1 << RADIX));
  }
}
inline I i_dot(I sum, B u, B s) {
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<int32_t>((u >> i) & 0xff) * static_cast<int8_t>((s >> i) & 0xff);
  }
  return sum;
}

inline B b_load(const uint8_t* p) {
  B word;
  __builtin_memcpy(&word, p, 4);
  return word;
}
inline B b_quad(const uint8_t* p) { return b_load(p); }
inline B b_or(B a, B b) { return a | b; }
template <int RIGHT, int MASK>
inline B b_extract(B a) {
  if constexpr (RIGHT > 0) a >>= RIGHT;
  if constexpr (RIGHT < 0) a <<= -RIGHT;
  return a & (0x01010101u * MASK);
}
template <int MASK>
inline B b_flip(B a) {
  return a ^ (0x01010101u * MASK);
}
inline B b_lookup(const uint8_t* table, B i) {
  return static_cast<B>(table[i & 15]) | static_cast<B>(table[(i >> 8) & 15]) << 8 |
         static_cast<B>(table[(i >> 16) & 15]) << 16 | static_cast<B>(table[(i >> 24) & 15]) << 24;
}
inline F b_even(B a) {
  const uint32_t bits = a << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline F b_odd(B a) {
  const uint32_t bits = a & 0xffff0000u;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
template <int ELEMENT, int SHIFT>
inline F b_float8(B a) {
  const uint32_t byte = a >> (8 * ELEMENT), bits = (byte & 0x80) << 24 | (byte & 0x7f) << SHIFT;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
