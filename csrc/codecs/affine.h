// Affine integer pages (src/kvbits/codecs/affine.py), attended by integer dot products on the packed codes.
// Included inside a per-ISA anonymous namespace.
//
// A key is k = s (u - o) + z with an unsigned code u; o is 128 for symmetric 8-bit codes and 0 else. Its product with a
// query is s (q . u) + (z - o s) sum(q). The query is rounded to integers q' (one or two byte terms); to keep that
// rounding from meeting the codes' mean, the mean code c is taken out of it exactly:
//   q . u ~ q' . u + c sum(q - q').
// Per channel, s is folded into the query first, once per page, and z gives one number for the whole page. Values are
// the same with the roles turned: the softmax weights are the unsigned operand, the codes the signed one.

template <int BITS>
constexpr int kTerms = BITS > 4 ? 2 : 1;  // one term's rounding is below 4-bit codes' own, not below finer ones'
template <int BITS>
constexpr int kRadix = BITS == 8 ? kRadixBits8 : 8;
template <int BITS, bool SYMMETRIC>
constexpr float kMeanCode = SYMMETRIC ? static_cast<float>(1 << (BITS - 1)) : static_cast<float>((1 << BITS) - 1) / 2;

template <int BITS>
constexpr size_t code_bytes(int dim) {
  return static_cast<size_t>(kPage) * dim * BITS / 8;
}

// sum[r][t][v] = dot products of row r's term t with the page's codes over the whole reduced dimension, for VECTORS
// vectors of lanes from `lane` on. CODES_UNSIGNED: which side of the instruction the codes are. A broadcast of the
// small operand costs as much as a product, so each serves VECTORS of them.
template <int BITS, int ROWS, int TERMS, int VECTORS, bool CODES_UNSIGNED>
inline void dot_lanes(const uint8_t* page, ptrdiff_t ahead, int reduction, int lanes, int lane,
                      const uint8_t* const* terms, int term_stride, I (&sum)[ROWS][TERMS][VECTORS]) {
  using P = Planes<BITS>;
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

template <int BITS, bool PER_CHANNEL, bool SYMMETRIC>
struct AffineKey {
  static constexpr int kT = kTerms<BITS>;
  static constexpr float kRadixValue = static_cast<float>(1 << kRadix<BITS>);

  static void prepare(QueryRow& row, int dim) {
    F sum[1] = {f_set(0)}, most[1] = {f_set(0)}, correction[1] = {f_set(0)};
    for (int i = 0; i < dim; i += kWidth) {
      const F q = f_load(row.query + i);
      sum[0] = f_add(sum[0], q);
      most[0] = f_max(most[0], f_abs(q));
    }
    row.sum = f_reduce_add(sum[0]);
    if constexpr (!PER_CHANNEL) {
      quantize_rows<1, kT, kRadix<BITS>, true>(row.query, dim, dim, most, sum, kMeanCode<BITS, SYMMETRIC>, row.codes,
                                               2 * dim, &row.unit, correction);
      row.correction = f_reduce_add(correction[0]) - (SYMMETRIC ? kMeanCode<BITS, true> * row.sum : 0.0f);
    }
  }

  template <int ROWS>
  static void score_rows(const uint8_t* page, ptrdiff_t ahead, int dim, const QueryRow* rows, float* scores) {
    const auto* scales = reinterpret_cast<const uint16_t*>(page + code_bytes<BITS>(dim));
    const uint16_t* zeros = scales + (PER_CHANNEL ? dim : kPage);
    prefetch_all(scales, ahead, (PER_CHANNEL ? dim : kPage) * (SYMMETRIC ? 2 : 4));
    const uint8_t* codes[ROWS];
    float unit[ROWS], bias[4];
    alignas(64) uint8_t folded_codes[PER_CHANNEL ? ROWS : 1][2 * kMaxDim];
    if constexpr (PER_CHANNEL) {
      alignas(64) float folded[ROWS][kMaxDim];
      F most[ROWS], sum[ROWS], correction[ROWS];
      for (int r = 0; r < ROWS; ++r) most[r] = sum[r] = correction[r] = f_set(0);
      for (int i = 0; i < dim; i += kWidth) {
        const F scale = f_load_half(scales + i), zero = f_load_half(zeros + i);
        for (int r = 0; r < ROWS; ++r) {
          const F q = f_load(rows[r].query + i);
          const F product = f_mul(q, scale);
          f_store(folded[r] + i, product);
          most[r] = f_max(most[r], f_abs(product));
          sum[r] = f_add(sum[r], product);
          correction[r] = f_fma(q, zero, correction[r]);
        }
      }
      quantize_rows<ROWS, kT, kRadix<BITS>, true>(folded[0], kMaxDim, dim, most, sum, kMeanCode<BITS, SYMMETRIC>,
                                                  folded_codes[0], 2 * kMaxDim, unit, correction);
      f_reduce_add_rows<ROWS>(correction, bias);
      for (int r = 0; r < ROWS; ++r) codes[r] = folded_codes[r];
    } else {
      for (int r = 0; r < ROWS; ++r) {
        codes[r] = rows[r].codes;
        unit[r] = rows[r].unit;
        bias[r] = rows[r].correction;
      }
    }

    constexpr int kVectors = lane_vectors(ROWS * kT, Planes<BITS>::kQuads);
    static_assert(kPage % (kWidth * kVectors) == 0);
    for (int lane = 0; lane < kPage; lane += kWidth * kVectors) {
      I sum[ROWS][kT][kVectors];
      dot_lanes<BITS, ROWS, kT, kVectors, true>(page, ahead, dim, kPage, lane, codes, dim, sum);
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        unrolled<kVectors>([&](auto v) KVBITS_INLINE {
          const int token = lane + v * kWidth;
          F dot = f_from(sum[r][0][v]);
          if constexpr (kT == 2) dot = f_fma(dot, f_set(kRadixValue), f_from(sum[r][1][v]));
          F score = f_fma(dot, f_set(unit[r]), f_set(bias[r]));
          if constexpr (!PER_CHANNEL) {
            score = f_mul(score, f_load_half(scales + token));
            if constexpr (!SYMMETRIC) score = f_fma(f_load_half(zeros + token), f_set(rows[r].sum), score);
          }
          f_store(scores + r * kPage + token, score);
        });
      });
    }
  }
};

template <int BITS, bool PER_CHANNEL, bool SYMMETRIC>
struct AffineValue {
  static_assert(BITS < 8 || SYMMETRIC, "8-bit value codes are the signed operand");
  static constexpr int kT = kTerms<BITS>;
  static constexpr float kRadixValue = static_cast<float>(1 << kRadix<BITS>);
  static constexpr float kCenter = SYMMETRIC ? 0.0f : kMeanCode<BITS, false>;

  template <int ROWS>
  static void accumulate_rows(const uint8_t* page, ptrdiff_t ahead, int dim, QueryRow* rows, const float* weights,
                              const float* keep) {
    const auto* scales = reinterpret_cast<const uint16_t*>(page + code_bytes<BITS>(dim));
    const uint16_t* zeros = scales + (PER_CHANNEL ? dim : kPage);
    prefetch_all(scales, ahead, (PER_CHANNEL ? dim : kPage) * (SYMMETRIC ? 2 : 4));
    alignas(64) uint8_t codes[ROWS][2 * kPage];
    float unit[ROWS], bias[4];
    float total[4];  // per channel: what the channel's zero point meets
    alignas(64) float folded[PER_CHANNEL ? 1 : ROWS][kPage];
    F most[ROWS], correction[ROWS], sum[ROWS];
    for (int r = 0; r < ROWS; ++r) most[r] = correction[r] = sum[r] = f_set(0);
    for (int i = 0; i < kPage; i += kWidth) {
      F scale = f_set(1), zero = f_set(0);
      if constexpr (!PER_CHANNEL) scale = f_load_half(scales + i);
      if constexpr (!PER_CHANNEL && !SYMMETRIC) zero = f_load_half(zeros + i);
      for (int r = 0; r < ROWS; ++r) {
        const F p = f_load(weights + r * kPage + i);
        if constexpr (PER_CHANNEL) {
          most[r] = f_max(most[r], p);
          sum[r] = f_add(sum[r], p);
        } else {
          const F product = f_mul(p, scale);
          f_store(folded[r] + i, product);
          most[r] = f_max(most[r], product);
          sum[r] = f_add(sum[r], product);
          if constexpr (!SYMMETRIC) correction[r] = f_fma(p, zero, correction[r]);
        }
      }
    }
    quantize_rows<ROWS, kT, kRadix<BITS>, false>(PER_CHANNEL ? weights : folded[0], kPage, kPage, most, sum, kCenter,
                                                 codes[0], 2 * kPage, unit, correction);
    f_reduce_add_rows<ROWS>(correction, bias);
    if constexpr (PER_CHANNEL) f_reduce_add_rows<ROWS>(sum, total);

    const uint8_t* terms[ROWS];
    for (int r = 0; r < ROWS; ++r) terms[r] = codes[r];
    constexpr int kVectors = lane_vectors(ROWS * kT, Planes<BITS>::kQuads);
    int lane = 0;
    for (; lane + kWidth * kVectors <= dim; lane += kWidth * kVectors) {
      accumulate_lanes<ROWS, kVectors>(page, ahead, dim, lane, terms, unit, bias, total, scales, zeros, rows, keep);
    }
    for (; lane < dim; lane += kWidth) {
      accumulate_lanes<ROWS, 1>(page, ahead, dim, lane, terms, unit, bias, total, scales, zeros, rows, keep);
    }
  }

 private:
  template <int ROWS, int VECTORS>
  static void accumulate_lanes(const uint8_t* page, ptrdiff_t ahead, int dim, int lane, const uint8_t* const* codes,
                               const float* unit, const float* bias, const float* total, const uint16_t* scales,
                               const uint16_t* zeros, QueryRow* rows, const float* keep) {
    I sum[ROWS][kT][VECTORS];
    dot_lanes<BITS, ROWS, kT, VECTORS, false>(page, ahead, kPage, dim, lane, codes, kPage, sum);
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
        const int channel = lane + v * kWidth;
        F dot = f_from(sum[r][0][v]);
        if constexpr (kT == 2) dot = f_fma(dot, f_set(kRadixValue), f_from(sum[r][1][v]));
        F gain = f_fma(dot, f_set(unit[r]), f_set(bias[r]));
        if constexpr (PER_CHANNEL) {
          gain = f_mul(gain, f_load_half(scales + channel));
          if constexpr (!SYMMETRIC) gain = f_fma(f_load_half(zeros + channel), f_set(total[r]), gain);
        }
        float* out = rows[r].accumulator + channel;
        f_store(out, f_fma(f_load(out), f_set(keep[r]), gain));
      });
    });
  }
};

// Encoding, once per page: plain loops over a matrix [reduction][lanes] that the compiler vectorizes. Every operation
// is the one of the torch reference, in float32 and in its order, so the bytes agree.
template <int BITS, bool SYMMETRIC>
struct AffineSeal {
  // kKey: the stored code is unsigned. PER_ROW: one parameter per reduced element, else one per lane.
  template <bool kKey, bool kPerRow>
  static void seal(const uint8_t* open_page, int reduction, int lanes, const Rounding& rounding, uint8_t* out) {
    thread_local float matrix[kPage * kMaxDim];
    thread_local uint8_t codes[kPage * kMaxDim];
    const auto* pairs = reinterpret_cast<const uint16_t*>(open_page);
    for (int pair = 0; pair < reduction / 2; ++pair) {
      for (int lane = 0; lane < lanes; ++lane) {
        matrix[(2 * pair) * lanes + lane] = bf16_to_float(pairs[2 * (pair * lanes + lane)]);
        matrix[(2 * pair + 1) * lanes + lane] = bf16_to_float(pairs[2 * (pair * lanes + lane) + 1]);
      }
    }
    const int n = kPerRow ? reduction : lanes;
    float low[kMaxDim], high[kMaxDim], scale[kMaxDim], inverse[kMaxDim];
    for (int i = 0; i < n; ++i) low[i] = high[i] = kPerRow ? matrix[i * lanes] : matrix[i];
    for (int row = 0; row < reduction; ++row) {
      const float* x = matrix + row * lanes;
      if constexpr (kPerRow) {
        float least = x[0], most = x[0];
        for (int lane = 0; lane < lanes; ++lane) {
          least = x[lane] < least ? x[lane] : least;
          most = x[lane] > most ? x[lane] : most;
        }
        low[row] = least;
        high[row] = most;
      } else {
        for (int lane = 0; lane < lanes; ++lane) {
          low[lane] = x[lane] < low[lane] ? x[lane] : low[lane];
          high[lane] = x[lane] > high[lane] ? x[lane] : high[lane];
        }
      }
    }
    constexpr int kTop = (1 << BITS) - 1, kLimit = (1 << (BITS - 1)) - 1;
    auto* scales = reinterpret_cast<uint16_t*>(out + static_cast<size_t>(reduction) * lanes * BITS / 8);
    for (int i = 0; i < n; ++i) {
      if constexpr (SYMMETRIC) {
        scales[i] = to_half((high[i] > -low[i] ? high[i] : -low[i]) / kLimit);
        low[i] = 0;
      } else {
        if (rounding.clip != 1.0f) {
          const float middle = (low[i] + high[i]) * 0.5f, reach = (high[i] - low[i]) * 0.5f * rounding.clip;
          low[i] = middle - reach;
          high[i] = middle + reach;
        }
        scales[n + i] = to_half(low[i]);
        low[i] = half_to_float(scales[n + i]);
        scales[i] = to_half((high[i] - low[i]) / kTop);
      }
      scale[i] = half_to_float(scales[i]);
      inverse[i] = scale[i] > 0 ? 1.0f / scale[i] : 0.0f;
    }
    const auto nearest = [&](float x, int i) {
      const float code = __builtin_rintf((x - low[i]) * inverse[i]);
      constexpr float kLeast = SYMMETRIC ? -kLimit : 0, kMost = SYMMETRIC ? kLimit : kTop;
      return code < kLeast ? kLeast : code > kMost ? kMost : code;
    };
    const auto stored = [&](float code) {
      if constexpr (SYMMETRIC) return static_cast<uint8_t>((static_cast<int>(code) + (kKey ? kLimit + 1 : 0)) & kTop);
      return static_cast<uint8_t>(code);
    };
    if (rounding.feedback == nullptr) {
      for (int row = 0; row < reduction; ++row) {
        for (int lane = 0; lane < lanes; ++lane) {
          codes[row * lanes + lane] = stored(nearest(matrix[row * lanes + lane], kPerRow ? row : lane));
        }
      }
    } else if constexpr (kKey) {
      // Channels are rows: what a row's rounding loses is taken from the rows still to come, lane by lane.
      float error[kPage];
      for (int step = 0; step < reduction; ++step) {
        const int row = rounding.order ? rounding.order[step] : step;
        for (int lane = 0; lane < kPage; ++lane) {
          const int i = kPerRow ? row : lane;
          const float x = matrix[row * kPage + lane], code = nearest(x, i);
          codes[row * kPage + lane] = stored(code);
          error[lane] = x - (code * scale[i] + low[i]);
        }
        const float* factors = rounding.feedback + static_cast<size_t>(step) * reduction;
        for (int later = step + 1; later < reduction; ++later) {
          float* y = matrix + (rounding.order ? rounding.order[later] : later) * kPage;
          for (int lane = 0; lane < kPage; ++lane) y[lane] -= error[lane] * factors[later];
        }
      }
    } else {
      // Channels are lanes: the same along each token's row.
      for (int row = 0; row < reduction; ++row) {
        float* x = matrix + row * lanes;
        for (int step = 0; step < lanes; ++step) {
          const int lane = rounding.order ? rounding.order[step] : step;
          const int i = kPerRow ? row : lane;
          const float code = nearest(x[lane], i);
          codes[row * lanes + lane] = stored(code);
          const float error = x[lane] - (code * scale[i] + low[i]);
          const float* factors = rounding.feedback + static_cast<size_t>(step) * lanes;
          for (int later = step + 1; later < lanes; ++later) {
            x[rounding.order ? rounding.order[later] : later] -= error * factors[later];
          }
        }
      }
    }
    uint8_t* end = store_codes<BITS>(codes, reduction, lanes, out) + n * (SYMMETRIC ? 2 : 4);
    // Pad to the cache line with zeros: page bytes are hashed, sent and compared.
    while ((end - out) % 64 != 0) *end++ = 0;
  }

  // A parameter beyond float16's range is stored as its largest finite value.
  static uint16_t to_half(float x) { return half_from_float(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x); }
};

template <int BITS, bool PER_CHANNEL, bool SYMMETRIC>
void seal_affine_key(const uint8_t* open_page, int dim, const Rounding& rounding, uint8_t* out) {
  AffineSeal<BITS, SYMMETRIC>::template seal<true, PER_CHANNEL>(open_page, dim, kPage, rounding, out);
}
template <int BITS, bool PER_CHANNEL, bool SYMMETRIC>
void seal_affine_value(const uint8_t* open_page, int dim, const Rounding& rounding, uint8_t* out) {
  AffineSeal<BITS, SYMMETRIC>::template seal<false, !PER_CHANNEL>(open_page, kPage, dim, rounding, out);
}
