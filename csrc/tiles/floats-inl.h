// Pages of bfloat16 and of 8-bit floats on tiles of bfloat16, any number of rows, where the model's rows are bfloat16:
// products of queries and keys are exact then. Weights are two terms, 16 bits of each. In float32 the vectors' kernels
// (codecs/raw-inl.h, codecs/float8-inl.h) do it. Included inside a per-ISA anonymous namespace.

// How a page becomes tiles of pairs of bfloat16, and what its elements are multiplied with.
struct RawTiles {
  using Key = RawKey;
  using Value = RawValue;
  static constexpr bool kStored = true;  // as tiles are, but for the end of the last step
  static float scale(const uint8_t*, int) { return 1; }
  static void prefetch(const uint8_t* page, ptrdiff_t ahead, int dim) { prefetch_all(page, ahead, kPage * dim * 2); }
  static void unpack(const uint8_t* page, int reduction, int lanes, uint8_t* out) {
    for (int pair = 0; pair < padded(reduction, 32) / 2; ++pair) {
      for (int lane = 0; lane < lanes; lane += kWidth) {
        const B both = pair < reduction / 2 ? b_load(page + (static_cast<size_t>(pair) * lanes + lane) * 4) : i_zero();
        _mm512_store_si512(unpacked_row(out, lanes, pair, lane), both);
      }
    }
  }
};

// The two bytes of the bfloat16 that a code without its sign stands for.
struct Float8Bytes {
  alignas(64) uint8_t low[128], high[128];
};
template <int MANTISSA>
constexpr Float8Bytes float8_bytes() {
  Float8Bytes bytes{};
  constexpr int kOne = 1 << MANTISSA;
  for (int code = 1; code < 128; ++code) {
    int exponent = code >> MANTISSA, mantissa = code & (kOne - 1);
    if (exponent == 0) {
      for (exponent = 1; mantissa < kOne; mantissa *= 2) --exponent;
    }
    const int bits = ((exponent + 127 - kFloat8Bias<MANTISSA>) << 7) | ((mantissa & (kOne - 1)) << (7 - MANTISSA));
    bytes.low[code] = static_cast<uint8_t>(bits);
    bytes.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return bytes;
}

template <int MANTISSA>
struct Float8Tiles {
  using Key = Float8Key<MANTISSA>;
  using Value = Float8Value<MANTISSA>;
  static constexpr bool kStored = false;
  static float scale(const uint8_t* page, int dim) { return float8_scale(page, 0, dim); }
  static void prefetch(const uint8_t* page, ptrdiff_t ahead, int dim) { prefetch_all(page, ahead, kPage * dim + 4); }
  static void unpack(const uint8_t* page, int reduction, int lanes, uint8_t* out) {
    static constexpr Float8Bytes bytes = float8_bytes<MANTISSA>();
    // Quads of a 128-bit lane as their first pairs, then their second.
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    const B sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const auto look_up = [](const uint8_t* table, B codes) {
      return _mm512_permutex2var_epi8(b_load(table), codes, b_load(table + 64));
    };
    for (int first = 0; first < padded(reduction, 32) / 4; first += 8) {
      for (int lane = 0; lane < lanes; lane += kWidth, out += kTileBytes) {
        for (int i = 0; i < 8; ++i) {
          const bool there = first + i < reduction / 4;
          B codes = there ? b_load(page + (static_cast<size_t>(first + i) * lanes + lane) * 4) : i_zero();
          codes = _mm512_shuffle_epi8(codes, order);
          const B low = look_up(bytes.low, codes), high = look_up(bytes.high, codes);
          const B signs = _mm512_ternarylogic_epi32(high, codes, sign, 0xf8);  // high | (codes & sign)
          _mm512_store_si512(out + i * 128, _mm512_unpacklo_epi8(low, signs));
          _mm512_store_si512(out + i * 128 + 64, _mm512_unpackhi_epi8(low, signs));
        }
      }
    }
  }
};

// The page as it lies where it can be, or unpacked by the first block that meets it.
template <class P>
inline TilePage float_page(const Block& block, const uint8_t* page, int reduction, int lanes, uint8_t* kept, int dim) {
  const ptrdiff_t ahead = block.first ? block.ahead : 0;
  if (P::kStored && reduction % 32 == 0) return {page, 4 * lanes, 64, 64 * lanes, ahead};
  if (ahead != 0) P::prefetch(page, ahead, dim);
  if (block.first) P::unpack(page, reduction, lanes, kept);
  return unpacked_page(kept, lanes);
}

template <class P>
void score_floats(const Block& block, int dim) {
  if (block.rows[0].source == nullptr) {
    for (int r = 0; r < block.count; r += kBlockRows) score_any<typename P::Key>(rows_from(block, r), dim);
    return;
  }
  const int steps = padded(dim, 32) / 32;
  alignas(64) uint16_t queries[kManyRows * kMaxDim];  // zeros meet the page's: what lies elsewhere may be no number
  for (int r = 0; r < block.count; ++r) {
    uint16_t* to = queries + r * steps * 32;
    __builtin_memcpy(to, block.rows[r].source, dim * 2);
    __builtin_memset(to + dim, 0, (steps * 32 - dim) * 2);
  }
  const TilePage page = float_page<P>(block, block.keys, dim, kPage, kept_keys(block), dim);
  const float scale = P::scale(block.keys, dim) * block.rows[0].scale * kLog2E;
  alignas(64) TileSums sums;
  multiply_page<Bfloat16, 1, kPage / kWidth>({queries, steps * 64, 0}, page, steps, steps, sums);
  for (int r = 0; r < block.count; ++r) {
    unrolled<kPage / kWidth>([&](auto v) KVBITS_INLINE {
      const F sum = f_load(reinterpret_cast<const float*>(sums[v][r]));
      f_store(block.scores + r * kPage + v * kWidth, f_mul(sum, f_set(scale)));
    });
  }
}

// Weights as two terms of bfloat16: their first 8 bits, the rest rounded.
inline void split_weights(const float* weights, uint16_t* terms) {
  for (int i = 0; i < kPage; i += 2 * kWidth) {
    F high[2], low[2];
    unrolled<2>([&](auto j) KVBITS_INLINE {
      const F weight = f_load(weights + i + j * kWidth);
      high[j] = b_odd(_mm512_castps_si512(weight));
      low[j] = f_sub(weight, high[j]);
    });
    _mm512_store_si512(terms + i, (__m512i)_mm512_cvtne2ps_pbh(high[1], high[0]));
    _mm512_store_si512(terms + kPage + i, (__m512i)_mm512_cvtne2ps_pbh(low[1], low[0]));
  }
}

template <class P>
void accumulate_floats(const Block& block, int dim) {
  if (block.rows[0].source == nullptr) {
    for (int r = 0; r < block.count; r += kBlockRows) accumulate_any<typename P::Value>(rows_from(block, r), dim);
    return;
  }
  alignas(64) uint16_t weights[kManyRows][2 * kPage];
  for (int r = 0; r < block.count; ++r) split_weights(block.scores + r * kPage, weights[r]);
  const TilePage page = float_page<P>(block, block.values, kPage, dim, kept_values(block), dim);
  const F scale = f_set(P::scale(block.values, dim));
  alignas(64) TileSums sums;
  constexpr int kSteps = kPage / 32;
  each_vectors<kTileSums>(dim / kWidth, [&](int v, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    multiply_page<Bfloat16, 1, kVectors>({weights, sizeof weights[0], 0}, page.from(v), 2 * kSteps, kSteps, sums);
    for (int r = 0; r < block.count; ++r) {
      unrolled<kVectors>([&](auto i) KVBITS_INLINE {
        const F gain = f_mul(f_load(reinterpret_cast<const float*>(sums[i][r])), scale);
        float* out = block.rows[r].accumulator + (v + i) * kWidth;
        f_store(out, f_fma(f_load(out), f_set(block.rescale[r]), gain));
      });
    }
  });
}
