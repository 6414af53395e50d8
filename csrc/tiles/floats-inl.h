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
        const B both =
            pair < reduction / 2 ? b_load(page + (static_cast<size_t>(pair) * lanes + lane) * 4) : i_zero();
        _mm512_store_si512(unpacked_row(out, lanes, pair, lane), both);
      }
    }
  }
};

template <int MANTISSA>
struct Float8Tiles {
  using Key = Float8Key<MANTISSA>;
  using Value = Float8Value<MANTISSA>;
  static constexpr bool kStored = false;
  static float scale(const uint8_t* page, int dim) { return float8_scale(page, 0, dim); }
  static void prefetch(const uint8_t* page, ptrdiff_t ahead, int dim) { prefetch_all(page, ahead, kPage * dim + 4); }
  static void unpack(const uint8_t* page, int reduction, int lanes, uint8_t* out) {
    const F power = f_set(MANTISSA == 3 ? 0x1p120f : 0x1p112f);
    const auto pair = [](F even, F odd) {  // exact: the lower halves are 0
      const __m512i high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
      return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16), high);
    };
    for (int quad = 0; quad < padded(reduction, 32) / 4; ++quad) {
      for (int lane = 0; lane < lanes; lane += kWidth) {
        B pairs[2] = {i_zero(), i_zero()};
        if (quad < reduction / 4) {
          const B codes = b_load(page + (static_cast<size_t>(quad) * lanes + lane) * 4);
          F x[4];
          unrolled<4>([&](auto i) KVBITS_INLINE { x[i] = f_mul(b_float8<i, 20 + 3 - MANTISSA>(codes), power); });
          pairs[0] = pair(x[0], x[1]);
          pairs[1] = pair(x[2], x[3]);
        }
        for (int i = 0; i < 2; ++i) _mm512_store_si512(unpacked_row(out, lanes, 2 * quad + i, lane), pairs[i]);
      }
    }
  }
};

// The page as it lies where it can be, or unpacked by the first block that meets it.
template <class P>
inline TilePage float_page(const Block& block, const uint8_t* page, int reduction, int lanes, uint8_t* kept, int dim) {
  if (block.first && block.ahead != 0) P::prefetch(page, block.ahead, dim);
  if (P::kStored && reduction % 32 == 0) return {page, 4 * lanes, 64, 64 * lanes};
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
