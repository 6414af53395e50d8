// Sixteen-bit floats in portable C++. `static` so that every ISA's object keeps its own copy.
#pragma once
#include <cstdint>

static inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  __builtin_memcpy(&x, &wide, 4);
  return x;
}

// Round to nearest even; a NaN stays a NaN.
static inline uint16_t bf16_from_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  float x;
  if (rest >= 0x7c00) {  // infinity, NaN
    const uint32_t bits = sign | 0x7f800000u | ((rest & 0x3ff) << 13);
    __builtin_memcpy(&x, &bits, 4);
    return x;
  }
  // Shift into place and let a multiplication by 2^112 mend the exponent, subnormals included.
  const uint32_t bits = rest << 13;
  __builtin_memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  uint32_t scaled;
  __builtin_memcpy(&scaled, &x, 4);
  scaled |= sign;
  __builtin_memcpy(&x, &scaled, 4);
  return x;
}

// Round to nearest even, overflow to infinity, underflow through subnormals (as F16C and torch do).
static inline uint16_t half_from_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000u) {  // subnormal or zero: adding 0.5 aligns the last half bit with the last float bit
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    uint32_t sum;
    __builtin_memcpy(&sum, &magnitude, 4);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

// What float16 cannot say becomes its largest number; zero has no sign, so that bytes do not tell how it came about.
static inline uint16_t saturated_half(float x) {
  const uint16_t half = half_from_float(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
  return half == 0x8000 ? 0 : half;
}

static inline bool is_finite(float x) { return __builtin_fabsf(x) < __builtin_inff(); }

// Whether NaN or an infinity is among `n` bfloat16 numbers.
static inline bool any_not_finite(const uint16_t* x, int n) {
  uint16_t largest = 0;
  for (int i = 0; i < n; ++i) {
    const uint16_t magnitude = x[i] & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest >= 0x7f80;
}

// A positive scale as one byte: the exponent and the three first mantissa bits of a float16, to nearest, or rounded up
// where codes must reach as far as the scale was made for; at most 61440.
static inline uint8_t scale8_from_float(float x, bool up) {
  const int byte = (saturated_half(x) + (up ? 127 : 64)) >> 7;
  return static_cast<uint8_t>(byte > 247 ? 247 : byte);
}

// `n` float16 numbers that are exactly those of `x`; returns the end.
static inline uint8_t* store_halves(const float* x, int n, uint8_t* out) {
  for (int i = 0; i < n; ++i, out += 2) {
    const uint16_t half = half_from_float(x[i]);
    __builtin_memcpy(out, &half, 2);
  }
  return out;
}
