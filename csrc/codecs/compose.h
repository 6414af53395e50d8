// Pages made of other codecs' pages. Included inside a per-ISA anonymous namespace.

template <int BITS>
constexpr size_t channel_page_bytes(int dim) {
  return (static_cast<size_t>(kPage) * dim * BITS / 8 + 4 * dim + 63) / 64 * 64;
}

// Key channels of two widths (src/kvbits/codecs/mixed.py): the page says in which order it stores them.
template <int HIGH, int LOW>
struct MixedKey {
  using HighForm = PlainForm<HIGH, true, false>;
  using LowForm = PlainForm<LOW, true, false>;

  static void prepare(QueryRow&, int) {}

  template <int ROWS>
  static void score_rows(const uint8_t* page, ptrdiff_t ahead, int dim, const QueryRow* rows, float* scores) {
    const int first = dim / 4;
    prefetch_all(page, ahead, dim);
    alignas(64) float gathered[ROWS][kMaxDim];
    QueryRow high[ROWS], low[ROWS];  // only their queries are read
    for (int r = 0; r < ROWS; ++r) {
      for (int c = 0; c < dim; ++c) gathered[r][c] = rows[r].query[page[c]];
      high[r].query = gathered[r];
      low[r].query = gathered[r] + first;
    }
    const uint8_t* high_page = page + (dim + 63) / 64 * 64;
    const uint8_t* low_page = high_page + channel_page_bytes<HIGH>(first);
    alignas(64) float rest[ROWS * kPage];
    AffineKey<HighForm>::template score_rows<ROWS>(high_page, ahead, first, high, scores);
    AffineKey<LowForm>::template score_rows<ROWS>(low_page, ahead, dim - first, low, rest);
    for (int i = 0; i < ROWS * kPage; i += kWidth) f_store(scores + i, f_add(f_load(scores + i), f_load(rest + i)));
  }

  static void seal(const uint8_t* open_page, int dim, const Rounding& rounding, uint8_t* out) {
    thread_local uint16_t permuted[kPage * kMaxDim];
    const auto* pairs = reinterpret_cast<const uint16_t*>(open_page);
    int order[kMaxDim];
    float reach[kMaxDim];
    for (int c = 0; c < dim; ++c) {
      float least = channel(pairs, c, 0), most = least;
      for (int t = 1; t < kPage; ++t) {
        const float x = channel(pairs, c, t);
        least = x < least ? x : least;
        most = x > most ? x : most;
      }
      reach[c] = most - least;
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
    seal_affine_key<HighForm>(reinterpret_cast<const uint8_t*>(permuted), first, nearest, end);
    seal_affine_key<LowForm>(reinterpret_cast<const uint8_t*>(permuted + at(first, 0)), dim - first, nearest,
                             end + channel_page_bytes<HIGH>(first));
  }

 private:
  static int at(int channel, int token) { return (channel / 2 * kPage + token) * 2 + channel % 2; }
  static float channel(const uint16_t* pairs, int c, int t) { return bf16_to_float(pairs[at(c, t)]); }
};

// Values with parameters for blocks of channels (src/kvbits/codecs/blocks.py): one page of affine.h a block.
template <int BITS>
struct BlockValue {
  using Form = PlainForm<BITS, false, false>;
  static constexpr int kBlock = 32;
  static constexpr size_t kBytes = (static_cast<size_t>(kPage) * kBlock * BITS / 8 + 4 * kPage + 63) / 64 * 64;

  template <int ROWS>
  static void accumulate_rows(const uint8_t* page, ptrdiff_t ahead, int dim, QueryRow* rows, const float* weights,
                              const float* keep) {
    QueryRow part[ROWS];  // only their accumulators are touched
    for (int block = 0; block < dim / kBlock; ++block) {
      for (int r = 0; r < ROWS; ++r) part[r].accumulator = rows[r].accumulator + block * kBlock;
      AffineValue<Form>::template accumulate_rows<ROWS>(page + block * kBytes, ahead, kBlock, part, weights, keep);
    }
  }

  static void seal(const uint8_t* open_page, int dim, const Rounding&, uint8_t* out) {
    uint32_t part[kPage / 2 * kBlock];  // a pair of tokens each
    for (int block = 0; block < dim / kBlock; ++block) {
      for (int pair = 0; pair < kPage / 2; ++pair) {
        __builtin_memcpy(part + pair * kBlock, open_page + (static_cast<size_t>(pair) * dim + block * kBlock) * 4,
                         kBlock * 4);
      }
      seal_affine_value<Form>(reinterpret_cast<const uint8_t*>(part), kBlock, {nullptr, nullptr, 1.0f},
                              out + block * kBytes);
    }
  }
};
