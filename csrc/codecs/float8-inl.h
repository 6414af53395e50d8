// 8-bit floats (src/kvbits/codecs/float8.py), attended in float: products are exact. Included inside a per-ISA
// anonymous namespace.
//
// A code's seven low bits, moved to a float's exponent and first mantissa bits, are the number times 2^(bias - 127),
// its subnormals included. The query (or the weights) carry half of the missing power, the page's scale the rest, so
// that nothing in between leaves float's range.

template <int MANTISSA>
constexpr int kFloat8Bias = MANTISSA == 3 ? 7 : 15;
template <int MANTISSA>
constexpr float kFloat8Largest = MANTISSA == 3 ? 448.0f : 57344.0f;
constexpr float kFloat8Lift = 0x1p60f;
template <int MANTISSA>
constexpr float kFloat8Rest = MANTISSA == 3 ? 0x1p60f : 0x1p52f;

// sum[r][v] += the four elements of each lane times the row's four factors.
template <int MANTISSA, int ROWS, int VECTORS>
inline void add_float8_quad(const B (&codes)[VECTORS], const float* const* factors, int quad, F (&sum)[ROWS][VECTORS]) {
  unrolled<4>([&](auto i) KVBITS_INLINE {
    F x[VECTORS];
    unrolled<VECTORS>([&](auto v) KVBITS_INLINE { x[v] = b_float8<i, 20 + 3 - MANTISSA>(codes[v]); });
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      const F factor = f_set(factors[r][4 * quad + i]);
      unrolled<VECTORS>([&](auto v) KVBITS_INLINE { sum[r][v] = f_fma(x[v], factor, sum[r][v]); });
    });
  });
}

template <int MANTISSA, int ROWS, int VECTORS>
inline void dot_float8(const uint8_t* page, ptrdiff_t ahead, int reduction, int lanes, int lane,
                       const float* const* factors, F (&sum)[ROWS][VECTORS]) {
  F acc[ROWS][VECTORS];
  unrolled<ROWS>([&](auto r) KVBITS_INLINE { unrolled<VECTORS>([&](auto v) KVBITS_INLINE { acc[r][v] = f_set(0); }); });
  for (int quad = 0; quad < reduction / 4; ++quad) {
    B codes[VECTORS];
    unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
      codes[v] = b_stream(page + (static_cast<size_t>(quad) * lanes + lane + v * kWidth) * 4, ahead);
    });
    add_float8_quad<MANTISSA>(codes, factors, quad, acc);
  }
  unrolled<ROWS>([&](auto r)
                     KVBITS_INLINE { unrolled<VECTORS>([&](auto v) KVBITS_INLINE { sum[r][v] = acc[r][v]; }); });
}

// The page's scale.
inline float float8_scale(const uint8_t* page, ptrdiff_t ahead, int dim) {
  const uint8_t* at = page + static_cast<size_t>(kPage) * dim;
  prefetch_all(at, ahead, 4);
  float scale;
  __builtin_memcpy(&scale, at, 4);
  return scale;
}

// What the sums of lifted products stand for: the missing power first, since its product with a scale may overflow.
template <int MANTISSA>
inline F float8_result(F sum, F scale) {
  return f_mul(f_mul(sum, f_set(kFloat8Rest<MANTISSA>)), scale);
}

template <int ROWS>
inline void lift(const float* const* rows, int n, float* out) {
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < n; i += kWidth) f_store(out + r * n + i, f_mul(f_load(rows[r] + i), f_set(kFloat8Lift)));
}

template <int MANTISSA>
struct Float8Key {
  static constexpr int kId = 128 + MANTISSA;
  static void prepare(QueryRow&, int) {}

  struct Folded {
    alignas(64) float lifted[kBlockRows * kMaxDim];
  };

  template <int ROWS>
  static void fold(const Block& block, int dim, Folded& folded) {
    const float* queries[ROWS];
    for (int r = 0; r < ROWS; ++r) queries[r] = block.rows[r].query;
    lift<ROWS>(queries, dim, folded.lifted);
  }

  template <int ROWS>
  static void score_rows(const Block& block, int dim, const Folded& folded) {
    constexpr int kVectors = lane_vectors(ROWS, 2, kRegisters / 2);
    const F scale = f_set(float8_scale(block.keys, block.ahead, dim));
    const float* factors[ROWS];
    for (int r = 0; r < ROWS; ++r) factors[r] = folded.lifted + r * dim;
    for (int lane = 0; lane < kPage; lane += kWidth * kVectors) {
      F sum[ROWS][kVectors];
      dot_float8<MANTISSA, ROWS, kVectors>(block.keys, block.ahead, dim, kPage, lane, factors, sum);
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        unrolled<kVectors>([&](auto v) KVBITS_INLINE {
          f_store(block.scores + r * kPage + lane + v * kWidth, float8_result<MANTISSA>(sum[r][v], scale));
        });
      });
    }
  }
};

template <int MANTISSA>
struct Float8Value {
  struct Folded {
    alignas(64) float lifted[kBlockRows * kPage];
  };

  template <int ROWS>
  static void fold(const Block& block, int, Folded& folded) {
    const float* weights[ROWS];
    for (int r = 0; r < ROWS; ++r) weights[r] = block.scores + r * kPage;
    lift<ROWS>(weights, kPage, folded.lifted);
  }

  template <int ROWS>
  static void accumulate_rows(const Block& block, int dim, const Folded& folded) {
    constexpr int kVectors = lane_vectors(ROWS, 2, kRegisters / 2);
    const F scale = f_set(float8_scale(block.values, block.ahead, dim));
    const float* factors[ROWS];
    for (int r = 0; r < ROWS; ++r) factors[r] = folded.lifted + r * kPage;
    int lane = 0;
    for (; lane + kWidth * kVectors <= dim; lane += kWidth * kVectors) {
      accumulate_lanes<ROWS, kVectors>(block, dim, lane, factors, scale);
    }
    for (; lane < dim; lane += kWidth) accumulate_lanes<ROWS, 1>(block, dim, lane, factors, scale);
  }

 private:
  template <int ROWS, int VECTORS>
  static void accumulate_lanes(const Block& block, int dim, int lane, const float* const* factors, F scale) {
    F sum[ROWS][VECTORS];
    dot_float8<MANTISSA, ROWS, VECTORS>(block.values, block.ahead, kPage, dim, lane, factors, sum);
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
        float* out = block.rows[r].accumulator + lane + v * kWidth;
        f_store(out, f_fma(f_load(out), f_set(block.rescale[r]), float8_result<MANTISSA>(sum[r][v], scale)));
      });
    });
  }
};

// To nearest even; |x| is at largest the format's largest number.
template <int MANTISSA>
inline uint8_t float8_from_float(float x) {
  constexpr int kDrop = 23 - MANTISSA, kRebias = (127 - kFloat8Bias<MANTISSA>) << MANTISSA;
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 24) & 0x80;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7f);
  if (bits < static_cast<uint32_t>(128 - kFloat8Bias<MANTISSA>) << 23) {  // subnormal: the code counts the least steps
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    const float steps = magnitude * static_cast<float>(1 << (kFloat8Bias<MANTISSA> - 1 + MANTISSA));
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(__builtin_rintf(steps)));
  }
  bits += (1u << (kDrop - 1)) - 1 + ((bits >> kDrop) & 1);
  return static_cast<uint8_t>(sign | ((bits >> kDrop) - kRebias));
}

template <int MANTISSA, bool KEY>
void seal_float8(const uint8_t* open_page, int dim, const Rounding&, uint8_t* out) {
  const int n = kPage * dim, lanes = KEY ? kPage : dim;
  const auto* pairs = reinterpret_cast<const uint16_t*>(open_page);
  const bool broken = any_not_finite(pairs, n);  // see seal-inl.h
  const auto element = [&](int i) {
    const float x = bf16_to_float(pairs[i]);
    return broken && !is_finite(x) ? 0.0f : x;
  };
  float largest = 0;
  for (int i = 0; i < n; ++i) {
    const float magnitude = __builtin_fabsf(element(i));
    largest = magnitude > largest ? magnitude : largest;
  }
  constexpr float kLargest = kFloat8Largest<MANTISSA>;
  float scale = largest / kLargest;
  const float inverse = scale > 0x1p-126f ? 1.0f / scale : 0.0f;
  for (int i = 0; i < n; ++i) {
    const float x = element(i) * inverse;
    const int lane = i / 2 % lanes, row = i / 2 / lanes * 2 + i % 2;
    out[(static_cast<size_t>(row / 4) * lanes + lane) * 4 + row % 4] =
        float8_from_float<MANTISSA>(x > kLargest    ? kLargest
                                    : x < -kLargest ? -kLargest
                                                    : x);
  }
  if (broken) scale = __builtin_nanf("");
  __builtin_memcpy(out + n, &scale, 4);
  for (uint8_t* end = out + n + 4; (end - out) % 64 != 0; ++end) *end = 0;
}
