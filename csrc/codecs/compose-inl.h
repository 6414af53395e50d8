// Pages made of other codecs' pages. Included inside a per-ISA anonymous namespace.

template <int BITS>
constexpr size_t channel_page_bytes(int dim) {
  return (static_cast<size_t>(kPage) * dim * BITS / 8 + 4 * dim + 63) / 64 * 64;
}

// Key channels of two widths (src/kvbits/codecs/mixed.py): the page says in which order it stores them.
template <int HIGH, int LOW>
struct MixedKey {
  static constexpr int kId = 512 + 16 * HIGH + LOW;
  using HighFormat = PlainFormat<HIGH, true, false>;
  using LowFormat = PlainFormat<LOW, true, false>;
  using High = AffineKey<HighFormat, false>;  // every page gathers the query in its own order
  using Low = AffineKey<LowFormat, false>;
  static constexpr int kHigh = HIGH, kLow = LOW;

  static void prepare(QueryRow&, int) {}

  struct Folded {
    typename High::Folded high;
    typename Low::Folded low;
  };

  template <int ROWS>
  static void fold(const Block& block, int dim, Folded& folded) {
    const int first = dim / 4;
    prefetch_all(block.keys, block.ahead, dim);
    alignas(64) float gathered[ROWS][kMaxDim];
    QueryRow high[ROWS], low[ROWS];  // only their queries are read
    for (int r = 0; r < ROWS; ++r) {
      for (int c = 0; c < dim; ++c) gathered[r][c] = block.rows[r].query[block.keys[c]];
      high[r].query = gathered[r];
      low[r].query = gathered[r] + first;
    }
    High::template fold<ROWS>(part<HIGH>(block, dim, high, block.scores), first, folded.high);
    Low::template fold<ROWS>(part<LOW>(block, dim, low, block.scores), dim - first, folded.low);
  }

  template <int ROWS>
  static void score_rows(const Block& block, int dim, const Folded& folded) {
    const int first = dim / 4;
    alignas(64) float rest[ROWS * kPage];
    float* scores = block.scores;
    High::template score_rows<ROWS>(part<HIGH>(block, dim, block.rows, scores), first, folded.high);
    Low::template score_rows<ROWS>(part<LOW>(block, dim, block.rows, rest), dim - first, folded.low);
    for (int i = 0; i < ROWS * kPage; i += kWidth) f_store(scores + i, f_add(f_load(scores + i), f_load(rest + i)));
  }

  static void seal(const uint8_t* open_page, int dim, const Rounding& rounding, uint8_t* out) {
    thread_local uint16_t permuted[kPage * kMaxDim];
    const auto* pairs = reinterpret_cast<const uint16_t*>(open_page);
    int order[kMaxDim];
    float reach[kMaxDim];
    for (int c = 0; c < dim; ++c) {
      float least = channel(pairs, c, 0), largest = least;
      for (int t = 1; t < kPage; ++t) {
        const float x = channel(pairs, c, t);
        least = x < least ? x : least;
        largest = x > largest ? x : largest;
      }
      reach[c] = largest - least;
      // Insertion: the standard library's sort would be compiled here, with this file's flags, for all.
      int place = c;
      while (rounding.order == nullptr && place > 0 && reach[order[place - 1]] < reach[c]) {
        order[place] = order[place - 1];
        --place;
      }
      order[place] = rounding.order ? rounding.order[c] : c;
    }
    for (int c = 0; c < dim; ++c) {
      out[c] = static_cast<uint8_t>(order[c]);
      for (int t = 0; t < kPage; ++t) permuted[at(c, t)] = pairs[at(order[c], t)];
    }
    uint8_t* end = out + dim;
    while ((end - out) % 64 != 0) *end++ = 0;
    const int first = dim / 4;
    const Rounding nearest{nullptr, nullptr, 1.0f};
    seal_affine_key<HighFormat>(reinterpret_cast<const uint8_t*>(permuted), first, nearest, end);
    seal_affine_key<LowFormat>(reinterpret_cast<const uint8_t*>(permuted + at(first, 0)), dim - first, nearest,
                               end + channel_page_bytes<HIGH>(first));
  }

  // The block as it meets the page of one width.
  template <int BITS>
  static Block part(const Block& block, int dim, QueryRow* rows, float* scores) {
    Block found = block;
    found.keys += (dim + 63) / 64 * 64 + (BITS == LOW ? channel_page_bytes<HIGH>(dim / 4) : 0);
    found.rows = rows;
    found.scores = scores;
    return found;
  }

 private:
  static int at(int channel, int token) { return (channel / 2 * kPage + token) * 2 + channel % 2; }
  static float channel(const uint16_t* pairs, int c, int t) {
    const float x = bf16_to_float(pairs[at(c, t)]);
    return is_finite(x) ? x : 0.0f;
  }
};

// Values with parameters for blocks of channels (src/kvbits/codecs/blocks.py): one page of affine-inl.h a block.
template <int BITS, int BLOCK>
struct BlockValue {
  static constexpr int kId = 1024 + BITS + 2 * (BLOCK - 32);
  using Format = PlainFormat<BITS, false, false>;
  static constexpr int kBlock = BLOCK;
  static constexpr size_t kBytes = (static_cast<size_t>(kPage) * kBlock * BITS / 8 + 4 * kPage + 63) / 64 * 64;

  struct Folded {
    typename AffineValue<Format>::Folded of[kMaxDim / kBlock];
  };

  template <int ROWS>
  static void fold(const Block& block, int dim, Folded& folded) {
    Block part = block;
    for (int i = 0; i < dim / kBlock; ++i, part.values += kBytes) {
      AffineValue<Format>::template fold<ROWS>(part, kBlock, folded.of[i]);
    }
  }

  template <int ROWS>
  static void accumulate_rows(const Block& block, int dim, const Folded& folded) {
    QueryRow rows[ROWS];  // only their accumulators are touched
    Block part = block;
    part.rows = rows;
    for (int i = 0; i < dim / kBlock; ++i, part.values += kBytes) {
      for (int r = 0; r < ROWS; ++r) rows[r].accumulator = block.rows[r].accumulator + i * kBlock;
      AffineValue<Format>::template accumulate_rows<ROWS>(part, kBlock, folded.of[i]);
    }
  }

  static void seal(const uint8_t* open_page, int dim, const Rounding&, uint8_t* out) {
    uint32_t part[kPage / 2 * kBlock];  // a pair of tokens each
    for (int block = 0; block < dim / kBlock; ++block) {
      for (int pair = 0; pair < kPage / 2; ++pair) {
        __builtin_memcpy(part + pair * kBlock, open_page + (static_cast<size_t>(pair) * dim + block * kBlock) * 4,
                         kBlock * 4);
      }
      seal_affine_value<Format>(reinterpret_cast<const uint8_t*>(part), kBlock, {nullptr, nullptr, 1.0f},
                                out + block * kBytes);
    }
  }
};
