// Products of weights in bits with inputs of 8 bits, for one instruction set.
//
// The sum over a group (or a half of it) is exact, in int32; a result is the float32 sum, group after group, of
// fused(sum, weight scale * input scale, before) and, with a minimum, fused(minimum, sum of the inputs, before).

constexpr int kStripVectors = kStrip / kWidth;
// Vectors of outputs that a group's sums are kept for, and most rows beside them.
constexpr int kVectorsAtOnce = 2;
constexpr int kProductRows = kRegisters >= 32 ? 8 : 4;
constexpr int kAheadBytes = 2048;  // of what is read, asked for into the second-level cache

template <class Format, int PART, int ROWS>
inline void add_part(const InputGroup* x, const uint8_t* header, const uint8_t* group, int lane,
                     F (&results)[ROWS][kVectorsAtOnce]) {
  constexpr int kParts = Format::kParams == Params::kSuperHalves ? 2 : 1;
  constexpr int kSteps = 4 / kParts;
  I sums[ROWS][kVectorsAtOnce];
  unrolled<ROWS>([&](auto r) {
    unrolled<kVectorsAtOnce>([&](auto v) { sums[r][v] = first_sum<Format, PART>(x[r]); });
  });
  unrolled<kSteps>([&](auto s) {
    constexpr int kStep = PART * kSteps + decltype(s)::value;
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
  unrolled<kVectorsAtOnce>([&](auto v) {
    const F scale = load_scale<Format, PART>(header, group, lane + decltype(v)::value * kWidth);
    unrolled<ROWS>([&](auto r) {
      results[r][v] = f_fused(f_from(sums[r][v]), f_mul(scale, f_set(x[r].scale)), results[r][v]);
    });
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
    for (int at = 0; at < Format::kGroupBytes; at += 64) __builtin_prefetch(group + at + kAheadBytes, 0, 2);
    add_part<Format, 0, ROWS>(x, header, group, lane, results);
    if constexpr (Format::kParams == Params::kSuperHalves) add_part<Format, 1, ROWS>(x, header, group, lane, results);
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

void quantize_groups(const uint16_t* x, int in, ptrdiff_t stride, InputGroup* out) {
  for (int begin = 0; begin < in; begin += kGroup, out += stride) {
    uint16_t last[kGroup] = {};
    const uint16_t* from = x + begin;
    if (in - begin < kGroup) {
      __builtin_memcpy(last, from, (in - begin) * sizeof(uint16_t));
      from = last;
    }
    uint16_t largest = 0;  // magnitudes are ordered like their bits, with NaN above all
    for (int i = 0; i < kGroup; ++i) {
      const uint16_t magnitude = from[i] & 0x7fff;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = bf16_to_float(largest) / 127;  // NaN makes every product with the codes NaN
    const float factor = scale > 0 ? 1 / scale : 0;
    int32_t halves[2] = {};
    for (int h = 0; h < 2; ++h) {
      for (int i = h * kGroup / 2; i < (h + 1) * kGroup / 2; ++i) {
        const float code = bf16_to_float(from[i]) * factor + 12582912.0f;  // 1.5 * 2^23: rounds to nearest even
        int32_t bits;
        __builtin_memcpy(&bits, &code, 4);
        const auto byte = static_cast<int8_t>(bits);
        out->codes[i] = byte;
        halves[h] += byte;
      }
    }
    const int32_t sum = halves[0] + halves[1];
    out->scale = scale;
    out->sum = scale * static_cast<float>(sum);
    out->minus8 = -8 * sum;
    out->minus16 = -16 * sum;
    out->minus128 = -128 * sum;
    out->minus32[0] = -32 * halves[0];
    out->minus32[1] = -32 * halves[1];
    out->unused = 0;
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

const ProductKernels kProducts = {kIsa, kProductRows, quantize_groups, product_of};
