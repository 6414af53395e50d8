// The kernels of codecs/affine-inl.h and codecs/compose-inl.h on tiles of bytes: sums of products of codes are exact,
// and everything else is the same code, so results are the vectors' to the bit. Included inside a per-ISA anonymous
// namespace.

// Codes [reduction / 4][lanes][4] as tiles, zeros after the last.
template <class Codes>
inline void unpack_codes(const uint8_t* page, ptrdiff_t ahead, int reduction, int lanes, uint8_t* out) {
  constexpr int kQuads = Codes::kQuads;
  for (int group = 0; group < reduction / (4 * kQuads); ++group) {
    for (int lane = 0; lane < lanes; lane += kWidth) {
      B codes[kQuads];
      Codes::load(page, ahead, reduction, lanes, group, lane, codes);
      for (int j = 0; j < kQuads; ++j) {
        _mm512_store_si512(unpacked_row(out, lanes, group * kQuads + j, lane), codes[j]);
      }
    }
  }
  for (int quad = reduction / 4; quad < padded(reduction, 64) / 4; ++quad) {
    for (int lane = 0; lane < lanes; lane += kWidth) {
      _mm512_store_si512(unpacked_row(out, lanes, quad, lane), i_zero());
    }
  }
}

// `codes`: where the block's keys are kept.
template <class K>
inline void score_codes(const Block& block, int dim, uint8_t* codes) {
  constexpr int kT = K::kT, kVectors = kTileSums / kT;
  if (block.first) unpack_codes<typename K::Codes>(block.keys, block.ahead, dim, kPage, codes);
  typename K::template FoldedRows<kManyRows> folded;
  each_few_rows(block, [&](const Block& part, int begin, auto rows) {
    K::template fold<decltype(rows)::value>(part, dim, folded, begin);
  });
  // Past a row's terms lie others' or nothing: zeros of the page meet them.
  alignas(64) uint8_t gathered[K::kPerChannel ? 1 : kManyRows * 2 * kMaxDim];
  const uint8_t* terms = folded.own_codes;
  if constexpr (!K::kPerChannel) {
    terms = gathered;
    for (int r = 0; r < block.count; ++r) __builtin_memcpy(gathered + r * 2 * dim, folded.codes[r], kT * dim);
  }
  const TilePage page = unpacked_page(codes, kPage);
  const auto params = K::Format::params(block.keys, dim);
  alignas(64) TileSums sums;
  for (int v = 0; v < kPage / kWidth; v += kVectors) {
    const int steps = padded(dim, 64) / 64;
    multiply_page<SignedUnsigned, kT, kVectors>({terms, 2 * dim, dim}, page.from(v), steps, steps, sums);
    typename K::Lanes lanes[kVectors];
    unrolled<kVectors>([&](auto i) KVBITS_INLINE { lanes[i] = {params, (v + i) * kWidth}; });
    float* scores = block.scores + v * kWidth;
    const QueryRow* row = block.rows;
    for (int r = 0, count = block.count; r < count; ++r, ++row, scores += kPage) {
      unrolled<kVectors>([&](auto i) KVBITS_INLINE {
        const I high = _mm512_load_si512(sums[i][r]), low = _mm512_load_si512(sums[(kT - 1) * kVectors + i][r]);
        f_store(scores + i * kWidth, K::score(high, low, folded, r, *row, lanes[i]));
      });
    }
  }
}

template <class K>
void score_codes_many(const Block& block, int dim) {
  score_codes<K>(block, dim, kept_keys(block));
}

// `codes`: where the block's values are kept.
template <class V>
inline void accumulate_codes(const Block& block, int dim, uint8_t* codes) {
  constexpr int kT = V::kT;
  if (block.first) unpack_codes<typename V::Codes>(block.values, block.ahead, kPage, dim, codes);
  typename V::template FoldedRows<kManyRows> folded;
  each_few_rows(block, [&](const Block& part, int begin, auto rows) {
    V::template fold<decltype(rows)::value>(part, dim, folded, begin);
  });
  const TilePage page = unpacked_page(codes, dim);
  const auto params = V::Format::params(block.values, dim);
  alignas(64) TileSums sums;
  each_vectors<kTileSums / kT>(dim / kWidth, [&](int v, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    multiply_page<UnsignedSigned, kT, kVectors>({folded.codes[0], 2 * kPage, kPage}, page.from(v), 1, 1, sums);
    typename V::Lanes lanes[kVectors];
    unrolled<kVectors>([&](auto i) KVBITS_INLINE { lanes[i] = {params, (v + i) * kWidth}; });
    const QueryRow* row = block.rows;
    const float* rescale = block.rescale;
    for (int r = 0, count = block.count; r < count; ++r, ++row) {
      float* out = row->accumulator + v * kWidth;
      const F shrink = f_set(rescale[r]);
      unrolled<kVectors>([&](auto i) KVBITS_INLINE {
        const I high = _mm512_load_si512(sums[i][r]), low = _mm512_load_si512(sums[(kT - 1) * kVectors + i][r]);
        f_store(out + i * kWidth, f_fma(f_load(out + i * kWidth), shrink, V::gain(high, low, folded, r, lanes[i])));
      });
    }
  });
}

template <class V>
void accumulate_codes_many(const Block& block, int dim) {
  accumulate_codes<V>(block, dim, kept_values(block));
}

template <class K>
void score_mixed_many(const Block& block, int dim) {
  const int first = dim / 4;
  alignas(64) float gathered[kManyRows][kMaxDim], rest[kManyRows * kPage];
  QueryRow high[kManyRows], low[kManyRows];  // only their queries are read
  for (int r = 0; r < block.count; ++r) {
    for (int c = 0; c < dim; ++c) gathered[r][c] = block.rows[r].query[block.keys[c]];
    high[r].query = gathered[r];
    low[r].query = gathered[r] + first;
  }
  uint8_t* codes = kept_keys(block);
  score_codes<typename K::High>(K::template part<K::kHigh>(block, dim, high, block.scores), first, codes);
  codes += padded(first, 64) * kPage;
  score_codes<typename K::Low>(K::template part<K::kLow>(block, dim, low, rest), dim - first, codes);
  for (int i = 0; i < block.count * kPage; i += kWidth) {
    f_store(block.scores + i, f_add(f_load(block.scores + i), f_load(rest + i)));
  }
}

template <class V>
void accumulate_blocks_many(const Block& block, int dim) {
  QueryRow rows[kManyRows];  // only their accumulators are touched
  Block part = block;
  part.rows = rows;
  for (int i = 0; i < dim / V::kBlock; ++i, part.values += V::kBytes) {
    for (int r = 0; r < block.count; ++r) rows[r].accumulator = block.rows[r].accumulator + i * V::kBlock;
    accumulate_codes<AffineValue<typename V::Format>>(part, V::kBlock, kept_values(block) + i * kPage * V::kBlock);
  }
}
