// Products of weights in bits with inputs of 8 bits, for one instruction set.
//
// The sums over the halves of a group are exact, in int32. A group's product is fused(second sum, its inputs' scale,
// first sum * its inputs' scale); a result is, group after group, fused(product, weights' scale, before) and, with a
// minimum, fused(minimum, sum of the inputs, before). Where the halves' weights have scales of their own, they multiply
// the sums, and the product is added.

constexpr int kStripVectors = kStrip / kWidth;
// Vectors of outputs that a group's sums are kept for, and most rows beside them.
constexpr int kVectorsAtOnce = 2;
constexpr int kProductRows = kRegisters >= 32 ? 6 : 4;
// How far ahead of the products weights and inputs are asked for. With 8 KiB instead of 2, 6 rows read 28 GB/s instead
// of 18 (Zen 5, one thread, Q4_K); without the inputs' part 512 rows of 8,960 inputs take 1.5 times as long.
constexpr int kAheadBytes = 8192, kAheadGroups = 8;

// sums[r][v]: over the codes of one half of a group.
template <class Format, int PART, int ROWS>
inline void sum_half(const InputGroup* x, const uint8_t* group, int lane, I (&sums)[ROWS][kVectorsAtOnce]) {
  unrolled<ROWS>(
      [&](auto r) { unrolled<kVectorsAtOnce>([&](auto v) { sums[r][v] = first_sum<Format, PART>(x[r]); }); });
  unrolled<2>([&](auto s) {
    constexpr int kStep = 2 * PART + decltype(s)::value;
    B quads[kVectorsAtOnce][2];
    unrolled<kVectorsAtOnce>(
        [&](auto v) { load_quads<Format::kBits, kStep>(group, lane + decltype(v)::value * kWidth, quads[v]); });
    unrolled<2>([&](auto q) {
      unrolled<ROWS>([&](auto r) {
        const B inputs = b_quad(reinterpret_cast<const uint8_t*>(x[r].codes) + 8 * kStep + 4 * decltype(q)::value);
        unrolled<kVectorsAtOnce>([&](auto v) {
          if constexpr (Format::kBits == 8) {
            sums[r][v] = i_dot_any(sums[r][v], quads[v][q], inputs);
          } else {
            sums[r][v] = i_dot(sums[r][v], quads[v][q], inputs);
          }
        });
      });
    });
  });
}

template <class Format, int ROWS>
inline void add_group(const InputGroup* x, const uint8_t* header, const uint8_t* group, int lane,
                      F (&results)[ROWS][kVectorsAtOnce]) {
  constexpr bool kOwnScales = Format::kParams == Params::kSuperHalves;
  F halves[ROWS][kVectorsAtOnce];
  I sums[ROWS][kVectorsAtOnce];
  const auto scale_of = [&](auto part, auto v) {
    return load_scale<Format, decltype(part)::value>(header, group, lane + decltype(v)::value * kWidth);
  };
  unrolled<2>([&](auto part) {
    sum_half<Format, decltype(part)::value, ROWS>(x, group, lane, sums);
    unrolled<kVectorsAtOnce>([&](auto v) {
      F scale = f_set(1);
      if constexpr (kOwnScales) scale = scale_of(part, v);
      unrolled<ROWS>([&](auto r) {
        const F sum = kOwnScales ? f_mul(f_from(sums[r][v]), scale) : f_from(sums[r][v]);
        const F unit = f_set(x[r].scale[decltype(part)::value]);
        halves[r][v] = decltype(part)::value == 0 ? f_mul(sum, unit) : f_fused(sum, unit, halves[r][v]);
      });
    });
  });
  unrolled<kVectorsAtOnce>([&](auto v) {
    if constexpr (kOwnScales) {
      unrolled<ROWS>([&](auto r) { results[r][v] = f_add(halves[r][v], results[r][v]); });
    } else {
      const F scale = scale_of(std::integral_constant<int, 0>{}, v);
      unrolled<ROWS>([&](auto r) { results[r][v] = f_fused(halves[r][v], scale, results[r][v]); });
    }
    if constexpr (Format::kHasMin) {
      const F least = load_min<Format>(header, group, lane + decltype(v)::value * kWidth);
      unrolled<ROWS>([&](auto r) { results[r][v] = f_fused(least, f_set(x[r].sum), results[r][v]); });
    }
  });
}

template <class Format, int ROWS>
inline void multiply_groups(const InputGroup* x, int groups, const uint8_t* strip, int lane, float* out) {
  F results[ROWS][kVectorsAtOnce];
  unrolled<ROWS>([&](auto r) { unrolled<kVectorsAtOnce>([&](auto v) { results[r][v] = f_set(0); }); });
  const uint8_t* header = strip;
  const uint8_t* group = strip + Format::kHeaderBytes;
  for (int g = 0; g < groups; ++g, x += ROWS, group += Format::kGroupBytes) {
    if (Format::kSuper && g % Format::kGroups == 0 && g > 0) {
      header = group;
      group += Format::kHeaderBytes;
    }
    for (int at = 0; at < Format::kGroupBytes; at += 64) __builtin_prefetch(group + at + kAheadBytes);
    if (ROWS > 2) {
      for (int r = 0; r < ROWS; ++r) __builtin_prefetch(x + kAheadGroups * ROWS + r);
    }
    add_group<Format, ROWS>(x, header, group, lane, results);
  }
  unrolled<ROWS>([&](auto r) {
    unrolled<kVectorsAtOnce>([&](auto v) {
      f_store(out + decltype(r)::value * kStrip + lane + decltype(v)::value * kWidth, results[r][v]);
    });
  });
}

template <class Format, int ROWS>
void multiply_rows(const InputGroup* x, int rows, int groups, const uint8_t* strip, float* out) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return multiply_rows<Format, ROWS - 1>(x, rows, groups, strip, out);
    for (int lane = 0; lane < kStrip; lane += kVectorsAtOnce * kWidth) {
      multiply_groups<Format, ROWS>(x, groups, strip, lane, out);
    }
  }
}

template <class Format>
void multiply_coded(const InputRows& x, int rows, int in, const uint8_t* strip, float* out) {
  multiply_rows<Format, kProductRows>(x.groups, rows, (in + kGroup - 1) / kGroup, strip, out);
}

void quantize_groups(const uint16_t* x, int in, ptrdiff_t stride, void* groups) {
  auto* out = static_cast<InputGroup*>(groups);
  for (int begin = 0; begin < in; begin += kGroup, out += stride) {
    uint16_t last[kGroup] = {};
    const uint16_t* from = x + begin;
    if (in - begin < kGroup) {
      __builtin_memcpy(last, from, (in - begin) * sizeof(uint16_t));
      from = last;
    }
    float sum = 0;
    for (int h = 0; h < 2; ++h) {
      const int first = h * kGroup / 2, last = first + kGroup / 2;
      uint16_t largest = 0;  // magnitudes are ordered like their bits, with NaN above all
      for (int i = first; i < last; ++i) {
        const uint16_t magnitude = from[i] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
      }
      const float scale = bf16_to_float(largest) / 127;  // NaN makes every product with the codes NaN
      const float factor = scale > 0 ? 1 / scale : 0;
      int32_t codes = 0;
      for (int i = first; i < last; ++i) {
        const float code = bf16_to_float(from[i]) * factor + 12582912.0f;  // 1.5 * 2^23: rounds to nearest even
        int32_t bits;
        __builtin_memcpy(&bits, &code, 4);
        const auto byte = static_cast<int8_t>(bits);
        out->codes[i] = byte;
        codes += byte;
      }
      out->scale[h] = scale;
      out->minus[h] = -codes;
      sum += scale * static_cast<float>(codes);
    }
    out->sum = sum;
  }
}

template <class... F>
const ProductKernel* find_product(int format, FormatList<F...>) {
  static const ProductKernel kernels[] = {{kProductRows, true, multiply_coded<F>}...};
  const int ids[] = {F::kId...};
  for (size_t i = 0; i < sizeof...(F); ++i) {
    if (ids[i] == format) return &kernels[i];
  }
  return nullptr;
}

const ProductKernel* product_of(int format) { return find_product(format, Formats{}); }

const ProductKernels kProducts = {kIsa, kProductRows, sizeof(InputGroup), quantize_groups, product_of};
