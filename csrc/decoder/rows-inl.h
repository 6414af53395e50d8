// The decoder's kernels on rows of one instruction set: included inside isa/rows_*.cpp's anonymous namespace, after one
// of simd/ and `kIsa`, its name.

// a: pairs of bfloat16 in 32-bit lanes; adds their products with the pair of x to each lane.
inline F add_pair_products(F sum, B a, uint32_t x) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
#else
  float even, odd;
  const uint32_t low = x << 16, high = x & 0xffff0000u;
  __builtin_memcpy(&even, &low, 4);
  __builtin_memcpy(&odd, &high, 4);
  return f_fma(b_odd(a), f_set(odd), f_fma(b_even(a), f_set(even), sum));
#endif
}

// Bytes ahead that a weight is asked for, into the second-level cache (27 to 30 GB/s with 8 rows on Zen 4).
constexpr int kAhead = 4096;

// As many rows and vectors of outputs at once as the registers hold sums for.
constexpr int kVectorsAtOnce = 2;
constexpr int kRowsAtOnce = kRegisters >= 32 ? 12 : 4;

template <int ROWS>
inline void multiply_pairs(const InputRows& x, int in, const uint8_t* strip, float* out) {
  F sums[ROWS][kVectorsAtOnce];
  unrolled<ROWS>([&](auto r) { unrolled<kVectorsAtOnce>([&](auto v) { sums[r][v] = f_set(0); }); });
  const auto add = [&](int k, int bytes) KVBITS_INLINE {
    B weights[kVectorsAtOnce];
    unrolled<kVectorsAtOnce>([&](auto v) KVBITS_INLINE {
      const uint8_t* from = strip + (k * kStrip + v * kWidth) * 4;
      weights[v] = b_load(from);
      __builtin_prefetch(from + kAhead, 0, 2);
    });
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      uint32_t pair = 0;
      __builtin_memcpy(&pair, x.x + r * x.stride + 2 * k, bytes);
      unrolled<kVectorsAtOnce>([&](auto v)
                                   KVBITS_INLINE { sums[r][v] = add_pair_products(sums[r][v], weights[v], pair); });
    });
  };
  for (int k = 0; k < in / 2; ++k) add(k, 4);
  if (in % 2 != 0) add(in / 2, 2);  // not what follows: a zero weight times no number is none
  unrolled<ROWS>(
      [&](auto r) { unrolled<kVectorsAtOnce>([&](auto v) { f_store(out + r * kStrip + v * kWidth, sums[r][v]); }); });
}

template <int ROWS>
void multiply_rows(const InputRows& x, int rows, int in, const uint8_t* strip, float* out) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return multiply_rows<ROWS - 1>(x, rows, in, strip, out);
    for (int lane = 0; lane < kStrip; lane += kVectorsAtOnce * kWidth) {
      multiply_pairs<ROWS>(x, in, strip + lane * 4, out + lane);
    }
  }
}

void multiply_any(const InputRows& x, int rows, int in, const uint8_t* strip, float* out) {
  multiply_rows<kRowsAtOnce>(x, rows, in, strip, out);
}

// Sixteen partial sums, added pairwise: the compiler makes vectors of them, and their order is fixed.
inline float mean_square(const float* x, int dim) {
  float sums[16] = {};
  int i = 0;
  for (; i + 16 <= dim; i += 16) {
    for (int j = 0; j < 16; ++j) sums[j] += x[i + j] * x[i + j];
  }
  for (int j = 0; i + j < dim; ++j) sums[j] += x[i + j] * x[i + j];
  for (int step = 8; step > 0; step /= 2) {
    for (int j = 0; j < step; ++j) sums[j] += sums[j + step];
  }
  return sums[0] / static_cast<float>(dim);
}

void norm_any(const float* x, const float* weight, float eps, int dim, uint16_t* out) {
  const float factor = 1.0f / __builtin_sqrtf(mean_square(x, dim) + eps);
  for (int i = 0; i < dim; ++i) out[i] = bf16_from_float(x[i] * factor * weight[i]);
}

void rotate_any(const float* x, const float* weight, float eps, int dim, const float* cos, const float* sin, int half,
                uint16_t* out) {
  float normed[kMaxDim];
  if (weight != nullptr) {
    const float factor = 1.0f / __builtin_sqrtf(mean_square(x, dim) + eps);
    for (int i = 0; i < dim; ++i) normed[i] = x[i] * factor * weight[i];
    x = normed;
  }
  for (int i = 0; i < half; ++i) {
    out[i] = bf16_from_float(x[i] * cos[i] - x[i + half] * sin[i]);
    out[i + half] = bf16_from_float(x[i + half] * cos[i + half] + x[i] * sin[i + half]);
  }
  for (int i = 2 * half; i < dim; ++i) out[i] = bf16_from_float(x[i]);
}

// e^x for |x| < 87, relative error below 2^-22: 2^n times a polynomial (Taylor, degree 7) on [-ln 2 / 2, ln 2 / 2].
inline float exponential(float x) {
  const float bounded = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // the integer part lands in the low mantissa bits
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &p, 4);
  bits += static_cast<int32_t>(n) * (1 << 23);
  __builtin_memcpy(&p, &bits, 4);
  return p;
}

// The activation's kind decided once, so that each loop is one of vectors.
template <class Activated>
inline void gate_with(const float* gate, const float* up, int count, uint16_t* out, const Activated& activated) {
  for (int i = 0; i < count; ++i) out[i] = bf16_from_float(activated(gate[i], up[i]));
}

void gate_any(const float* gate, const float* up, int count, const Gate& how, uint16_t* out) {
  const float alpha = how.alpha, limit = how.limit;
  switch (how.activation) {
    case Activation::kSilu:
      return gate_with(gate, up, count, out, [](float g, float u) { return g / (1.0f + exponential(-g)) * u; });
    case Activation::kGeluTanh:  // 0.5 (1 + tanh y) = 1 / (1 + e^-2y)
      return gate_with(gate, up, count, out, [](float g, float u) {
        const float y = 0.7978845608f * (g + 0.044715f * g * g * g);
        return g / (1.0f + exponential(-2.0f * y)) * u;
      });
    case Activation::kClamped:
      return gate_with(gate, up, count, out, [=](float g, float u) {
        g = g > limit ? limit : g;
        u = u > limit ? limit : u < -limit ? -limit : u;
        return g / (1.0f + exponential(-alpha * g)) * (u + 1.0f);
      });
  }
}

void round_any(const float* x, int count, uint16_t* out) {
  for (int i = 0; i < count; ++i) out[i] = bf16_from_float(x[i]);
}

void normalize_any(float* x, const float* weight, float eps, int dim) {
  const float factor = 1.0f / __builtin_sqrtf(mean_square(x, dim) + eps);
  for (int i = 0; i < dim; ++i) x[i] *= factor * weight[i];
}

void soft_cap_any(float* x, float cap, int count) {
  const float twice = 2.0f / cap;
  for (int i = 0; i < count; ++i) x[i] = cap - 2.0f * cap / (1.0f + exponential(x[i] * twice));
}

const RowKernels kRows = {
    kIsa, {kRowsAtOnce, false, multiply_any}, norm_any, rotate_any, gate_any, round_any, normalize_any, soft_cap_any};
