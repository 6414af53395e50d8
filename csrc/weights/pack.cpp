#include "pack.h"

#include "stored.h"

namespace kvbits {
namespace {

// The four bytes of a row in a sequence of quads.
uint32_t get_quad(const uint8_t* bytes, int quad, int row) {
  uint32_t word;
  std::memcpy(&word, bytes + (quad * kStrip + row) * 4, 4);
  return word;
}
void put_quad(uint8_t* bytes, int quad, int row, uint32_t word) {
  std::memcpy(bytes + (quad * kStrip + row) * 4, &word, 4);
}

constexpr int kPlanes = 4;  // the index, in quads of rows, at which planes begin

template <int BITS>
void put_codes(const uint8_t* codes, int row, uint8_t* to) {
  uint32_t quads[8];
  std::memcpy(quads, codes, sizeof quads);
  if constexpr (BITS == 8) {
    for (int q = 0; q < 8; ++q) put_quad(to, q, row, quads[q]);
    return;
  }
  for (int s = 0; s < 4; ++s) {
    put_quad(to, s, row, (quads[2 * s] & 0x0f0f0f0fu) | (quads[2 * s + 1] & 0x0f0f0f0fu) << 4);
  }
  if constexpr (BITS == 5) {
    uint32_t plane = 0;
    for (int q = 0; q < 8; ++q) plane |= (quads[q] >> 4 & 0x01010101u) << q;
    put_quad(to, kPlanes, row, plane);
  }
  if constexpr (BITS == 6) {
    for (int half = 0; half < 2; ++half) {
      uint32_t plane = 0;
      for (int q = 0; q < 4; ++q) plane |= (quads[4 * half + q] >> 4 & 0x03030303u) << 2 * q;
      put_quad(to, kPlanes + half, row, plane);
    }
  }
}

template <int BITS>
void get_codes(const uint8_t* from, int row, uint8_t* codes) {
  uint32_t quads[8];
  for (int q = 0; q < 8; ++q) {
    if constexpr (BITS == 8) {
      quads[q] = get_quad(from, q, row);
    } else {
      quads[q] = get_quad(from, q / 2, row) >> 4 * (q % 2) & 0x0f0f0f0fu;
      if (BITS == 5) quads[q] |= (get_quad(from, kPlanes, row) >> q & 0x01010101u) << 4;
      if (BITS == 6) quads[q] |= (get_quad(from, kPlanes + q / 4, row) >> 2 * (q % 4) & 0x03030303u) << 4;
    }
  }
  std::memcpy(codes, quads, sizeof quads);
}

void put_half(uint8_t* halves, int row, uint16_t bits) { std::memcpy(halves + 2 * row, &bits, 2); }
float get_half(const uint8_t* halves, int row) { return half_to_float(read_half(halves + 2 * row)); }

template <class F>
void pack(const uint8_t* stored, int row, uint8_t* strip) {
  StoredBlock block;
  Stored<F>::read(stored, block);
  if (F::kSuper) {
    put_half(strip, row, block.scale);
    if (F::kHasMin) put_half(strip + 2 * kStrip, row, block.min);
  }
  for (int g = 0; g < F::kGroups; ++g) {
    uint8_t* group = strip + F::kHeaderBytes + g * F::kGroupBytes;
    put_codes<F::kBits>(block.codes + g * kGroup, row, group);
    uint8_t* scales = group + F::kCodeBytes;
    if (F::kParams == Params::kSuperHalves) {
      scales[row] = block.scales[2 * g];
      scales[kStrip + row] = block.scales[2 * g + 1];
    } else if (F::kSuper) {
      scales[row] = block.scales[g];
      scales[kStrip + row] = block.mins[g];
    } else {
      put_half(scales, row, block.scale);
      if (F::kHasMin) put_half(scales + 2 * kStrip, row, block.min);
    }
  }
}

template <class F>
void unpack(const uint8_t* strip, int row, float* out) {
  for (int g = 0; g < F::kGroups; ++g) {
    const uint8_t* group = strip + F::kHeaderBytes + g * F::kGroupBytes;
    const uint8_t* scales = group + F::kCodeBytes;
    uint8_t codes[kGroup];
    get_codes<F::kBits>(group, row, codes);
    for (int half = 0; half < 2; ++half) {
      float scale = get_half(F::kSuper ? strip : scales, row), min = 0;
      if (F::kParams == Params::kSuperHalves) {
        scale *= static_cast<float>(static_cast<int8_t>(scales[half * kStrip + row]));
      } else if (F::kSuper) {
        scale *= static_cast<float>(scales[row]);
        min = -(get_half(strip + 2 * kStrip, row) * static_cast<float>(scales[kStrip + row]));
      } else if (F::kHasMin) {
        min = get_half(scales + 2 * kStrip, row);
        if (F::kParams == Params::kScaleZero) min = -(scale * min);
      }
      for (int i = 0; i < kGroup / 2; ++i) {
        const float product = scale * static_cast<float>(codes[half * kGroup / 2 + i] - F::kOffset);
        *out++ = F::kHasMin ? product + min : product;
      }
    }
  }
}

// bfloat16: a pair of inputs is a quad of bytes.
void pack_pair(const uint8_t* stored, int row, uint8_t* strip) { std::memcpy(strip + row * 4, stored, 4); }
void unpack_pair(const uint8_t* strip, int row, float* out) {
  out[0] = bf16_to_float(read_half(strip + row * 4));
  out[1] = bf16_to_float(read_half(strip + row * 4 + 2));
}

template <class... F>
const WeightFormat* find(int id, FormatList<F...>) {
  static const WeightFormat formats[] = {
      {kBf16, 2, 4, 4 * kStrip, pack_pair, unpack_pair},
      {F::kId, F::kGroups * kGroup, Stored<F>::kBytes, F::kBlockBytes, pack<F>, unpack<F>}...};
  for (const WeightFormat& format : formats) {
    if (format.id == id) return &format;
  }
  return nullptr;
}

}  // namespace

const WeightFormat* weight_format(int id) { return find(id, Formats{}); }

}  // namespace kvbits
