// ggml's blocks (layouts: ggml-common.h of the ggml library), taken apart.
#pragma once
#include <cstring>

#include "../numbers.h"
#include "formats.h"

namespace kvbits {

constexpr int kSuperInputs = 256;

// A block of any format: unsigned codes, float16 scales as bits, scales of 8 bits by group (half a group for Q6_K).
struct StoredBlock {
  uint8_t codes[kSuperInputs];
  uint16_t scale, min;
  uint8_t scales[16], mins[8];
};

inline uint16_t read_half(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

// 32 codes of which the low nibbles of `bytes` are the first half.
inline void read_nibbles(const uint8_t* bytes, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = bytes[i] & 15;
    codes[i + 16] = bytes[i] >> 4;
  }
}

// Scales and minima of 6 bits in 12 bytes: six low bits of the first four each, the others' in nibbles and top bits.
inline void read_six_bits(const uint8_t* p, uint8_t* scales, uint8_t* mins) {
  for (int i = 0; i < 4; ++i) {
    scales[i] = p[i] & 63;
    mins[i] = p[i + 4] & 63;
    scales[i + 4] = static_cast<uint8_t>((p[i + 8] & 15) | (p[i] >> 6 << 4));
    mins[i + 4] = static_cast<uint8_t>((p[i + 8] >> 4) | (p[i + 4] >> 6 << 4));
  }
}

template <class F>
struct Stored;  // kBytes, and read(bytes, block)

// Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, int8, uint4, uint8: scale, perhaps minimum or zero, perhaps fifth bits, codes.
template <int ID, int BITS, Params PARAMS>
struct Stored<Format<ID, BITS, PARAMS>> {
  static constexpr bool kMin = Format<ID, BITS, PARAMS>::kTwoHalves;
  static constexpr int kBytes = (kMin ? 4 : 2) + BITS * kGroup / 8;
  static void read(const uint8_t* p, StoredBlock& block) {
    block.scale = read_half(p);
    if (kMin) block.min = read_half(p + 2);
    p += kMin ? 4 : 2;
    if constexpr (BITS == 8) {
      for (int i = 0; i < kGroup; ++i) block.codes[i] = kMin ? p[i] : p[i] ^ 0x80;
      return;
    }
    read_nibbles(BITS == 5 ? p + 4 : p, block.codes);
    if constexpr (BITS == 5) {
      for (int i = 0; i < kGroup; ++i) block.codes[i] |= static_cast<uint8_t>((p[i / 8] >> i % 8 & 1) << 4);
    }
  }
};

// Q4_K, Q5_K.
template <int ID, int BITS>
struct Stored<Format<ID, BITS, Params::kSuperScaleMin>> {
  static constexpr int kBytes = 16 + BITS * kSuperInputs / 8;
  static void read(const uint8_t* p, StoredBlock& block) {
    block.scale = read_half(p);
    block.min = read_half(p + 2);
    read_six_bits(p + 4, block.scales, block.mins);
    const uint8_t *high = p + 16, *low = BITS == 5 ? high + kGroup : high;
    for (int g = 0; g < 8; ++g) {
      for (int i = 0; i < kGroup; ++i) {
        uint8_t code = static_cast<uint8_t>(low[g / 2 * kGroup + i] >> 4 * (g % 2) & 15);
        if (BITS == 5) code |= static_cast<uint8_t>((high[i] >> g & 1) << 4);
        block.codes[g * kGroup + i] = code;
      }
    }
  }
};

// Q6_K.
template <int ID, int BITS>
struct Stored<Format<ID, BITS, Params::kSuperHalves>> {
  static constexpr int kBytes = 210;
  static void read(const uint8_t* p, StoredBlock& block) {
    const uint8_t *low = p, *high = p + 128, *scales = p + 192;
    for (int half = 0; half < 2; ++half, low += 64, high += 32) {
      for (int g = 0; g < 4; ++g) {
        for (int i = 0; i < kGroup; ++i) {
          const int nibble = low[g % 2 * kGroup + i] >> 4 * (g / 2) & 15, top = high[i] >> 2 * g & 3;
          block.codes[(4 * half + g) * kGroup + i] = static_cast<uint8_t>(nibble | top << 4);
        }
      }
    }
    std::memcpy(block.scales, scales, 16);
    block.scale = read_half(p + 208);
  }
};

}  // namespace kvbits
