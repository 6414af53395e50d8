// Pages of integer codes with scales and zero points (formats-inl.h), attended by integer dot products on the packed
// codes. Included inside a per-ISA anonymous namespace.
//
// A key is k = s (u - o) + z with an unsigned code u; o is 128 for symmetric 8-bit codes and 0 else. Its product with a
// query is s (q . u) + (z - o s) sum(q). The query is rounded to integers q' (one or two byte terms); to keep that
// rounding from meeting the codes' mean, the mean code c is taken out of it exactly:
//   q . u ~ q' . u + c sum(q - q').
// Per channel, s is folded into the query first, once per page, and z gives one number for the whole page: in 16 bit
// integers where two terms follow (the query is rounded once per row, s once per page), else in float. Values are the
// same with the roles turned: the softmax weights are the unsigned operand, the codes the signed one.

// sum[r][t][v] = dot products of row r's term t with the page's codes over the whole reduced dimension, for VECTORS
// vectors of lanes from `lane` on. CODES_UNSIGNED: which side of the instruction the codes are. A broadcast of the
// small operand costs as much as a product, so each serves VECTORS of them.
template <class P, int ROWS, int TERMS, int VECTORS, bool CODES_UNSIGNED>
inline void dot_lanes(const uint8_t* page, ptrdiff_t ahead, int reduction, int lanes, int lane,
                      const uint8_t* const* terms, int term_stride, I (&sum)[ROWS][TERMS][VECTORS]) {
  // A local array: stores to the caller's could be what the next broadcast loads, for all the compiler knows.
  I acc[ROWS][TERMS][VECTORS];
  unrolled<ROWS>([&](auto r) KVBITS_INLINE {
    unrolled<TERMS>([&](auto t)
                        KVBITS_INLINE { unrolled<VECTORS>([&](auto v) KVBITS_INLINE { acc[r][t][v] = i_zero(); }); });
  });
  for (int group = 0; group < reduction / (4 * P::kQuads); ++group) {
    B codes[VECTORS][P::kQuads];
    unrolled<VECTORS>(
        [&](auto v) KVBITS_INLINE { P::load(page, ahead, reduction, lanes, group, lane + v * kWidth, codes[v]); });
    unrolled<P::kQuads>([&](auto j) KVBITS_INLINE {
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        unrolled<TERMS>([&](auto t) KVBITS_INLINE {
          const B small = b_quad(terms[r] + t * term_stride + 4 * (group * P::kQuads + j));
          unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
            acc[r][t][v] =
                CODES_UNSIGNED ? i_dot(acc[r][t][v], codes[v][j], small) : i_dot(acc[r][t][v], small, codes[v][j]);
          });
        });
      });
    });
  }
  unrolled<ROWS>([&](auto r) KVBITS_INLINE {
    unrolled<TERMS>(
        [&](auto t) KVBITS_INLINE { unrolled<VECTORS>([&](auto v) KVBITS_INLINE { sum[r][t][v] = acc[r][t][v]; }); });
  });
}

// ONCE: `prepare` sees the query that all pages are to meet.
template <class FORMAT, bool ONCE = true>
struct AffineKey {
  static constexpr int kT = FORMAT::kTerms;
  static constexpr bool kPerChannel = FORMAT::kPerChannel;
  // Two terms have 15 bits: what their rounding loses against the codes' mean is far below what the codes lose.
  static constexpr float kKeyMean = kT == 2 ? 0.0f : FORMAT::kKeyMean;
  using Codes = typename FORMAT::KeyCodes;
  static constexpr float kRadixValue = static_cast<float>(1 << FORMAT::kRadix);
  using Format = FORMAT;

  static void prepare(QueryRow& row, int dim) {
    const float* query = row.query;
    alignas(64) float rotated[FORMAT::kRotated ? kMaxDim : 1];
    if constexpr (FORMAT::kRotated) {
      __builtin_memcpy(rotated, query, dim * sizeof(float));
      rotate(rotated, dim, 1, 1);
      query = rotated;
    }
    F rounded[1][kVectorsOf<0>], sum = f_set(0), largest[1] = {f_set(0)};
    for (int i = 0; i < dim / kWidth; ++i) {
      rounded[0][i] = f_load(query + i * kWidth);
      sum = f_add(sum, rounded[0][i]);
      largest[0] = f_max_abs(largest[0], rounded[0][i]);
    }
    row.sum = f_reduce_add(sum);
    if (in_words(dim)) {
      constexpr float kLimit = kSignedLimit<2, FORMAT::kRadix>;
      float top[4];
      f_reduce_max_positive_rows<1>(largest, top);
      const F factor = f_set(top[0] > 0 ? kLimit / top[0] : 0.0f);
      row.unit = top[0] * (1.0f / kLimit);
      for (int i = 0; i < dim / kWidth; i += 4) pack_words(rounded[0] + i, factor, row.codes + 2 * i * kWidth);
    } else if constexpr (!kPerChannel) {
      F correction[1] = {f_mul(sum, f_set(kKeyMean))};
      quantize_rows<1, kT, FORMAT::kRadix, true, 0>(rounded, dim / kWidth, largest, kKeyMean, row.codes, 2 * dim,
                                                    &row.unit, correction);
      row.correction = f_reduce_add(correction[0]) - FORMAT::kKeyOffset * row.sum;
    }
  }

  // The rows' queries in the page's units, as integers.
  template <int MOST>
  struct FoldedRows {
    const uint8_t* codes[MOST];
    float unit[MOST], bias[MOST];
    float centers[MOST];  // the query's products with the page's centers
    alignas(64) uint8_t own_codes[kPerChannel ? MOST * 2 * kMaxDim : 1];
  };
  using Folded = FoldedRows<kBlockRows>;

  // The block's rows become the `at`-th and following.
  template <int ROWS, int MOST>
  static void fold(const Block& block, int dim, FoldedRows<MOST>& folded_rows, int at = 0) {
    const QueryRow* rows = block.rows;
    const auto params = FORMAT::params(block.keys, dim);
    params.prefetch(block.ahead);
    static_assert(!(kPerChannel && FORMAT::kCentered));
    if constexpr (kPerChannel) {
      const auto fold_vectors = [&](auto n) {
        if (in_words(dim)) return fold_words<ROWS, n>(block, dim, folded_rows, at);
        fold_channels<ROWS, n>(block, dim, folded_rows, at);
      };
      if constexpr (fixed_vectors(64) > 0) {
        if (dim == 64) return fold_vectors(std::integral_constant<int, fixed_vectors(64)>{});
        if (dim == 128) return fold_vectors(std::integral_constant<int, fixed_vectors(128)>{});
      }
      fold_vectors(std::integral_constant<int, 0>{});
    } else {
      for (int r = 0; r < ROWS; ++r) {
        folded_rows.codes[at + r] = rows[r].codes;
        folded_rows.unit[at + r] = rows[r].unit;
        folded_rows.bias[at + r] = rows[r].correction;
      }
    }
    if constexpr (FORMAT::kCentered) {
      F sum[ROWS];
      for (int r = 0; r < ROWS; ++r) sum[r] = f_set(0);
      for (int i = 0; i < dim; i += kWidth) {
        const F center = params.center(i);
        for (int r = 0; r < ROWS; ++r) sum[r] = f_fma(f_load(rows[r].query + i), center, sum[r]);
      }
      f_reduce_add_rows<ROWS>(sum, folded_rows.centers + at);
    }
  }

  template <int ROWS>
  static void score_rows(const Block& block, int dim, const Folded& folded) {
    const auto params = FORMAT::params(block.keys, dim);
    constexpr int kVectors = lane_vectors(ROWS * kT, Codes::kQuads);
    static_assert(kPage % (kWidth * kVectors) == 0);
    for (int lane = 0; lane < kPage; lane += kWidth * kVectors) {
      I sum[ROWS][kT][kVectors];
      dot_lanes<Codes, ROWS, kT, kVectors, true>(block.keys, block.ahead, dim, kPage, lane, folded.codes, dim, sum);
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        unrolled<kVectors>([&](auto v) KVBITS_INLINE {
          const int token = lane + v * kWidth;
          f_store(block.scores + r * kPage + token,
                  score(sum[r][0][v], sum[r][kT - 1][v], folded, r, block.rows[r], Lanes(params, token)));
        });
      });
    }
  }

  // What a vector of tokens' scores have in common.
  struct Lanes {
    Lanes() = default;
    template <class Params>
    Lanes([[maybe_unused]] const Params& params, [[maybe_unused]] int token) {
      if constexpr (!kPerChannel) scale = params.scale(token);
      if constexpr (!kPerChannel && FORMAT::kZeros) zero = params.zero(token, scale);
    }
    F scale = f_set(1), zero = f_set(0);
  };

  // Row r's scores from the sums with its terms.
  template <int MOST>
  static F score(I high, I low, const FoldedRows<MOST>& folded, int r, const QueryRow& row, const Lanes& lanes) {
    F dot = f_from(high);
    if constexpr (kT == 2) dot = f_fma(dot, f_set(kRadixValue), f_from(low));
    F score = f_fma(dot, f_set(folded.unit[r]), f_set(folded.bias[r]));
    if constexpr (!kPerChannel) {
      score = FORMAT::kCentered ? f_fma(score, lanes.scale, f_set(folded.centers[r])) : f_mul(score, lanes.scale);
      if constexpr (FORMAT::kZeros) score = f_fma(lanes.zero, f_set(row.sum), score);
    }
    return score;
  }

 private:
  static bool in_words(int dim) { return ONCE && kPerChannel && kT == 2 && dim % (4 * kWidth) == 0; }

  // Four vectors times `factor` as 16-bit integers.
  [[gnu::always_inline]] static inline void pack_words(const F* x, F factor, uint8_t* out) {
    I rounded[4];
    for (int i = 0; i < 4; ++i) rounded[i] = i_round(f_mul(x[i], factor));
    W words[2];
    w_pack(rounded, words);
    w_store(out, words[0]);
    w_store(out + 4 * kWidth, words[1]);
  }

  // What all rows need of a page: its scales as words, of which one is worth `unit`, and its zeros.
  struct PageWords {
    alignas(64) uint8_t scales[2 * kMaxDim];
    alignas(64) float zeros[kMaxDim];
    float unit;
  };
  static_assert(sizeof(PageWords) <= kKeptBytes);

  template <int N>
  static void keep(const Block& block, int dim, PageWords& page) {
    constexpr float kLimit = 32767;
    const auto params = FORMAT::params(block.keys, dim);
    F scale[kVectorsOf<N>], largest[1] = {f_set(0)};
    each_vector<N>(dim / kWidth, [&](auto i) KVBITS_INLINE {
      scale[i] = params.scale(i * kWidth);
      largest[0] = f_max_positive(largest[0], scale[i]);
      // Not the zero alone: a scale that is no number must reach the scores.
      f_store(page.zeros + i * kWidth, f_fma(scale[i], f_set(0), params.zero(i * kWidth, scale[i])));
    });
    float top[4];
    f_reduce_max_positive_rows<1>(largest, top);
    const F factor = f_set(top[0] > 0 ? kLimit / top[0] : 0.0f);
    each_vector<N / 4>(dim / kWidth / 4,
                       [&](auto i) KVBITS_INLINE { pack_words(scale + i * 4, factor, page.scales + i * 8 * kWidth); });
    page.unit = top[0] * (32768 / kLimit);  // of w_mul
  }

  template <int ROWS, int N, int MOST>
  static void fold_words(const Block& block, int dim, FoldedRows<MOST>& folded, int at) {
    auto& page = *reinterpret_cast<PageWords*>(block.kept);
    if (block.first) keep<N>(block, dim, page);
    F correction[ROWS];
    unrolled<ROWS>([&](auto r) KVBITS_INLINE { correction[r] = f_set(0); });
    each_vector<N>(dim / kWidth, [&](auto i) KVBITS_INLINE {
      const F zero = f_load(page.zeros + i * kWidth);
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        correction[r] = f_fma(f_load(block.rows[r].query + i * kWidth), zero, correction[r]);
      });
    });
    each_vector<N / 4>(dim / kWidth / 4, [&](auto i) KVBITS_INLINE {
      constexpr int kBytes = 4 * kWidth;  // of a vector; the words of as many channels are two
      const W scales[2] = {w_load(page.scales + i * 2 * kBytes), w_load(page.scales + i * 2 * kBytes + kBytes)};
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        const uint8_t* query = block.rows[r].codes + i * 2 * kBytes;
        const W product[2] = {w_mul(w_load(query), scales[0]), w_mul(w_load(query + kBytes), scales[1])};
        uint8_t* out = folded.own_codes + (at + r) * 2 * dim + i * kBytes;
        w_store_terms<FORMAT::kRadix>(out, out + dim, product);
      });
    });
    f_reduce_add_rows<ROWS>(correction, folded.bias + at);
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      folded.codes[at + r] = folded.own_codes + (at + r) * 2 * dim;
      folded.unit[at + r] = block.rows[r].unit * page.unit;
    });
  }

  // `correction` gets the query's products with the zero points and with what the codes' mean stands for.
  template <int ROWS, int N, int MOST>
  static void fold_channels(const Block& block, int dim, FoldedRows<MOST>& folded, int at) {
    static_assert(FORMAT::kZeros);
    const auto params = FORMAT::params(block.keys, dim);
    F product[ROWS][kVectorsOf<N>], largest[ROWS], correction[ROWS];
    unrolled<ROWS>([&](auto r) KVBITS_INLINE { largest[r] = correction[r] = f_set(0); });
    each_vector<N>(dim / kWidth, [&](auto i) KVBITS_INLINE {
      const F scale = params.scale(i * kWidth);
      // Where the mean is 0 too: a scale that is no number must reach the scores.
      const F base = f_fma(scale, f_set(kKeyMean), params.zero(i * kWidth, scale));
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        const F q = f_load(block.rows[r].query + i * kWidth);
        product[r][i] = f_mul(q, scale);
        largest[r] = f_max_abs(largest[r], product[r][i]);
        correction[r] = f_fma(q, base, correction[r]);
      });
    });
    uint8_t* codes = folded.own_codes + at * 2 * dim;
    quantize_rows<ROWS, kT, FORMAT::kRadix, true, N>(product, dim / kWidth, largest, kKeyMean, codes, 2 * dim,
                                                     folded.unit + at, correction);
    f_reduce_add_rows<ROWS>(correction, folded.bias + at);
    for (int r = 0; r < ROWS; ++r) folded.codes[at + r] = codes + r * 2 * dim;
  }
};

template <class FORMAT>
struct AffineValue {
  static constexpr int kT = FORMAT::kTerms;
  static constexpr bool kPerChannel = FORMAT::kPerChannel;
  using Codes = typename FORMAT::ValueCodes;
  static constexpr float kRadixValue = static_cast<float>(1 << FORMAT::kRadix);
  using Format = FORMAT;

  // The rows' weights in the page's units, as integers.
  template <int MOST>
  struct FoldedRows {
    alignas(64) uint8_t codes[MOST][2 * kPage];
    float unit[MOST], bias[MOST];
    float total[MOST];  // per channel: what the channel's zero point meets
  };
  using Folded = FoldedRows<kBlockRows>;

  // The block's rows become the `at`-th and following.
  template <int ROWS, int MOST>
  static void fold(const Block& block, int dim, FoldedRows<MOST>& folded_rows, int at = 0) {
    constexpr int kN = fixed_vectors(kPage);
    constexpr float kMean = kT == 2 ? 0.0f : FORMAT::kValueMean;
    const auto params = FORMAT::params(block.values, dim);
    params.prefetch(block.ahead);
    F product[ROWS][kVectorsOf<kN>], largest[ROWS], correction[ROWS], sum[ROWS];
    unrolled<ROWS>([&](auto r) KVBITS_INLINE { largest[r] = correction[r] = sum[r] = f_set(0); });
    each_vector<kN>(kPage / kWidth, [&](auto i) KVBITS_INLINE {
      F scale = f_set(1), base = f_set(0);  // of the tokens; base: what a weight meets beside the rounded codes
      if constexpr (!kPerChannel) {
        scale = params.scale(i * kWidth);
        if constexpr (FORMAT::kZeros || kMean != 0) base = f_mul(scale, f_set(kMean));
        if constexpr (FORMAT::kZeros) base = f_add(base, params.zero(i * kWidth, scale));
      }
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        const F p = f_load(block.scores + r * kPage + i * kWidth);
        product[r][i] = kPerChannel ? p : f_mul(p, scale);
        largest[r] = f_max_positive(largest[r], product[r][i]);
        if constexpr (kPerChannel) sum[r] = f_add(sum[r], p);
        if constexpr (!kPerChannel && (FORMAT::kZeros || kMean != 0)) correction[r] = f_fma(p, base, correction[r]);
      });
    });
    if constexpr (kPerChannel) {
      unrolled<ROWS>([&](auto r) KVBITS_INLINE { correction[r] = f_mul(sum[r], f_set(kMean)); });
    }
    quantize_rows<ROWS, kT, FORMAT::kRadix, false, kN>(product, kPage / kWidth, largest, kMean, folded_rows.codes[at],
                                                       2 * kPage, folded_rows.unit + at, correction);
    f_reduce_add_rows<ROWS>(correction, folded_rows.bias + at);
    if constexpr (kPerChannel) f_reduce_add_rows<ROWS>(sum, folded_rows.total + at);
  }

  template <int ROWS>
  static void accumulate_rows(const Block& block, int dim, const Folded& folded) {
    constexpr int kVectors = lane_vectors(ROWS * kT, Codes::kQuads);
    int lane = 0;
    for (; lane + kWidth * kVectors <= dim; lane += kWidth * kVectors) {
      accumulate_lanes<ROWS, kVectors>(block, dim, lane, folded);
    }
    if constexpr (kVectors > 2) {
      for (; lane + kWidth * 2 <= dim; lane += kWidth * 2) {
        accumulate_lanes<ROWS, 2>(block, dim, lane, folded);
      }
    }
    for (; lane < dim; lane += kWidth) {
      accumulate_lanes<ROWS, 1>(block, dim, lane, folded);
    }
  }

  // What a vector of channels' gains have in common.
  struct Lanes {
    Lanes() = default;
    template <class Params>
    Lanes([[maybe_unused]] const Params& params, [[maybe_unused]] int channel) {
      if constexpr (kPerChannel) scale = params.scale(channel);
      if constexpr (kPerChannel && FORMAT::kZeros) zero = params.zero(channel, scale);
    }
    F scale = f_set(1), zero = f_set(0);
  };

  // What row r's accumulator gains, from the sums with its terms.
  template <int MOST>
  static F gain(I high, I low, const FoldedRows<MOST>& folded, int r, const Lanes& lanes) {
    F dot = f_from(high);
    if constexpr (kT == 2) dot = f_fma(dot, f_set(kRadixValue), f_from(low));
    F gain = f_fma(dot, f_set(folded.unit[r]), f_set(folded.bias[r]));
    if constexpr (kPerChannel) {
      gain = f_mul(gain, lanes.scale);
      if constexpr (FORMAT::kZeros) gain = f_fma(lanes.zero, f_set(folded.total[r]), gain);
    }
    return gain;
  }

 private:
  template <int ROWS, int VECTORS>
  static void accumulate_lanes(const Block& block, int dim, int lane, const Folded& folded) {
    const auto params = FORMAT::params(block.values, dim);
    const uint8_t* codes[ROWS];
    for (int r = 0; r < ROWS; ++r) codes[r] = folded.codes[r];
    I sum[ROWS][kT][VECTORS];
    dot_lanes<Codes, ROWS, kT, VECTORS, false>(block.values, block.ahead, kPage, dim, lane, codes, kPage, sum);
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
        const int channel = lane + v * kWidth;
        float* out = block.rows[r].accumulator + channel;
        f_store(out, f_fma(f_load(out), f_set(block.rescale[r]),
                           gain(sum[r][0][v], sum[r][kT - 1][v], folded, r, Lanes(params, channel))));
      });
    });
  }
};
