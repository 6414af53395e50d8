// Pages of integer codes with scales and zero points (forms.h), attended by integer dot products on the packed codes.
// Included inside a per-ISA anonymous namespace.
//
// A key is k = s (u - o) + z with an unsigned code u; o is 128 for symmetric 8-bit codes and 0 else. Its product with a
// query is s (q . u) + (z - o s) sum(q). The query is rounded to integers q' (one or two byte terms); to keep that
// rounding from meeting the codes' mean, the mean code c is taken out of it exactly:
//   q . u ~ q' . u + c sum(q - q').
// Per channel, s is folded into the query first, once per page, and z gives one number for the whole page. Values are
// the same with the roles turned: the softmax weights are the unsigned operand, the codes the signed one.

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

template <class FORM>
struct AffineKey {
  static constexpr int kT = FORM::kTerms;
  static constexpr bool kPerChannel = FORM::kPerChannel;
  using Codes = typename FORM::KeyCodes;
  static constexpr float kRadixValue = static_cast<float>(1 << FORM::kRadix);

  static void prepare(QueryRow& row, int dim) {
    const float* query = row.query;
    alignas(64) float rotated[FORM::kRotated ? kMaxDim : 1];
    if constexpr (FORM::kRotated) {
      __builtin_memcpy(rotated, query, dim * sizeof(float));
      rotate(rotated, dim, 1, 1);
      query = rotated;
    }
    F sum[1] = {f_set(0)}, most[1] = {f_set(0)}, correction[1] = {f_set(0)};
    for (int i = 0; i < dim; i += kWidth) {
      const F q = f_load(query + i);
      sum[0] = f_add(sum[0], q);
      most[0] = f_max(most[0], f_abs(q));
    }
    row.sum = f_reduce_add(sum[0]);
    if constexpr (!kPerChannel) {
      quantize_rows<1, kT, FORM::kRadix, true>(query, dim, dim, most, sum, FORM::kKeyMean, row.codes, 2 * dim,
                                               &row.unit, correction);
      row.correction = f_reduce_add(correction[0]) - FORM::kKeyOffset * row.sum;
    }
  }

  template <int ROWS>
  static void score_rows(const uint8_t* page, ptrdiff_t ahead, int dim, const QueryRow* rows, float* scores) {
    const auto params = FORM::params(page, dim);
    params.prefetch(ahead);
    const uint8_t* codes[ROWS];
    float unit[ROWS], bias[4];
    alignas(64) uint8_t folded_codes[kPerChannel ? ROWS : 1][2 * kMaxDim];
    if constexpr (kPerChannel) {
      alignas(64) float folded[ROWS][kMaxDim];
      F most[ROWS], sum[ROWS], correction[ROWS];
      for (int r = 0; r < ROWS; ++r) most[r] = sum[r] = correction[r] = f_set(0);
      for (int i = 0; i < dim; i += kWidth) {
        static_assert(FORM::kZeros);
        const F scale = params.scale(i), zero = params.zero(i, scale);
        for (int r = 0; r < ROWS; ++r) {
          const F q = f_load(rows[r].query + i);
          const F product = f_mul(q, scale);
          f_store(folded[r] + i, product);
          most[r] = f_max(most[r], f_abs(product));
          sum[r] = f_add(sum[r], product);
          correction[r] = f_fma(q, zero, correction[r]);
        }
      }
      quantize_rows<ROWS, kT, FORM::kRadix, true>(folded[0], kMaxDim, dim, most, sum, FORM::kKeyMean, folded_codes[0],
                                                  2 * kMaxDim, unit, correction);
      f_reduce_add_rows<ROWS>(correction, bias);
      for (int r = 0; r < ROWS; ++r) codes[r] = folded_codes[r];
    } else {
      for (int r = 0; r < ROWS; ++r) {
        codes[r] = rows[r].codes;
        unit[r] = rows[r].unit;
        bias[r] = rows[r].correction;
      }
    }
    float centers[4];  // the query's products with the page's centers
    if constexpr (FORM::kCentered) {
      F sum[ROWS];
      for (int r = 0; r < ROWS; ++r) sum[r] = f_set(0);
      for (int i = 0; i < dim; i += kWidth) {
        const F center = params.center(i);
        for (int r = 0; r < ROWS; ++r) sum[r] = f_fma(f_load(rows[r].query + i), center, sum[r]);
      }
      f_reduce_add_rows<ROWS>(sum, centers);
    }

    constexpr int kVectors = lane_vectors(ROWS * kT, Codes::kQuads);
    static_assert(kPage % (kWidth * kVectors) == 0);
    for (int lane = 0; lane < kPage; lane += kWidth * kVectors) {
      I sum[ROWS][kT][kVectors];
      dot_lanes<Codes, ROWS, kT, kVectors, true>(page, ahead, dim, kPage, lane, codes, dim, sum);
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        unrolled<kVectors>([&](auto v) KVBITS_INLINE {
          const int token = lane + v * kWidth;
          F dot = f_from(sum[r][0][v]);
          if constexpr (kT == 2) dot = f_fma(dot, f_set(kRadixValue), f_from(sum[r][1][v]));
          F score = f_fma(dot, f_set(unit[r]), f_set(bias[r]));
          if constexpr (!kPerChannel) {
            const F scale = params.scale(token);
            score = FORM::kCentered ? f_fma(score, scale, f_set(centers[r])) : f_mul(score, scale);
            if constexpr (FORM::kZeros) score = f_fma(params.zero(token, scale), f_set(rows[r].sum), score);
          }
          f_store(scores + r * kPage + token, score);
        });
      });
    }
  }
};

template <class FORM>
struct AffineValue {
  static constexpr int kT = FORM::kTerms;
  static constexpr bool kPerChannel = FORM::kPerChannel;
  using Codes = typename FORM::ValueCodes;
  static constexpr float kRadixValue = static_cast<float>(1 << FORM::kRadix);

  template <int ROWS>
  static void accumulate_rows(const uint8_t* page, ptrdiff_t ahead, int dim, QueryRow* rows, const float* weights,
                              const float* keep) {
    const auto params = FORM::params(page, dim);
    params.prefetch(ahead);
    alignas(64) uint8_t codes[ROWS][2 * kPage];
    float unit[ROWS], bias[4];
    float total[4];  // per channel: what the channel's zero point meets
    alignas(64) float folded[kPerChannel ? 1 : ROWS][kPage];
    F most[ROWS], correction[ROWS], sum[ROWS];
    for (int r = 0; r < ROWS; ++r) most[r] = correction[r] = sum[r] = f_set(0);
    for (int i = 0; i < kPage; i += kWidth) {
      F scale = f_set(1), zero = f_set(0);
      if constexpr (!kPerChannel) scale = params.scale(i);
      if constexpr (!kPerChannel && FORM::kZeros) zero = params.zero(i, scale);
      for (int r = 0; r < ROWS; ++r) {
        const F p = f_load(weights + r * kPage + i);
        if constexpr (kPerChannel) {
          most[r] = f_max(most[r], p);
          sum[r] = f_add(sum[r], p);
        } else {
          const F product = f_mul(p, scale);
          f_store(folded[r] + i, product);
          most[r] = f_max(most[r], product);
          sum[r] = f_add(sum[r], product);
          if constexpr (FORM::kZeros) correction[r] = f_fma(p, zero, correction[r]);
        }
      }
    }
    quantize_rows<ROWS, kT, FORM::kRadix, false>(kPerChannel ? weights : folded[0], kPage, kPage, most, sum,
                                                 FORM::kValueMean, codes[0], 2 * kPage, unit, correction);
    f_reduce_add_rows<ROWS>(correction, bias);
    if constexpr (kPerChannel) f_reduce_add_rows<ROWS>(sum, total);

    const uint8_t* terms[ROWS];
    for (int r = 0; r < ROWS; ++r) terms[r] = codes[r];
    constexpr int kVectors = lane_vectors(ROWS * kT, Codes::kQuads);
    int lane = 0;
    for (; lane + kWidth * kVectors <= dim; lane += kWidth * kVectors) {
      accumulate_lanes<ROWS, kVectors>(page, ahead, dim, lane, terms, unit, bias, total, params, rows, keep);
    }
    if constexpr (kVectors > 2) {
      for (; lane + kWidth * 2 <= dim; lane += kWidth * 2) {
        accumulate_lanes<ROWS, 2>(page, ahead, dim, lane, terms, unit, bias, total, params, rows, keep);
      }
    }
    for (; lane < dim; lane += kWidth) {
      accumulate_lanes<ROWS, 1>(page, ahead, dim, lane, terms, unit, bias, total, params, rows, keep);
    }
  }

 private:
  template <int ROWS, int VECTORS>
  static void accumulate_lanes(const uint8_t* page, ptrdiff_t ahead, int dim, int lane, const uint8_t* const* codes,
                               const float* unit, const float* bias, const float* total,
                               const typename FORM::Params& params, QueryRow* rows, const float* keep) {
    I sum[ROWS][kT][VECTORS];
    dot_lanes<Codes, ROWS, kT, VECTORS, false>(page, ahead, kPage, dim, lane, codes, kPage, sum);
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
        const int channel = lane + v * kWidth;
        F dot = f_from(sum[r][0][v]);
        if constexpr (kT == 2) dot = f_fma(dot, f_set(kRadixValue), f_from(sum[r][1][v]));
        F gain = f_fma(dot, f_set(unit[r]), f_set(bias[r]));
        if constexpr (kPerChannel) {
          const F scale = params.scale(channel);
          gain = f_mul(gain, scale);
          if constexpr (FORM::kZeros) gain = f_fma(params.zero(channel, scale), f_set(total[r]), gain);
        }
        float* out = rows[r].accumulator + channel;
        f_store(out, f_fma(f_load(out), f_set(keep[r]), gain));
      });
    });
  }
};
