// The small operand of an integer dot product: queries, or a page's softmax weights, as one or two byte terms.
// Included inside a per-ISA anonymous namespace. Rows go in lockstep: their dependency chains overlap.

// How many vectors `elements` are, where the compiler should know it to keep a row in registers; 0: a run-time number
// of vectors, kept in memory.
constexpr int fixed_vectors(int elements) { return kRegisters == 32 ? elements / kWidth : 0; }
template <int N>
constexpr int kVectorsOf = N > 0 ? N : kMaxDim / kWidth;

// body(0), ..., body(n - 1); N is n where the compiler knows it, else 0.
template <int N, class Body>
[[gnu::always_inline]] inline void each_vector(int n, Body&& body) {
  if constexpr (N > 0) {
    unrolled<N>(body);
  } else {
    for (int i = 0; i < n; ++i) body(i);
  }
}

// Only instruction sets that store four vectors together have it.
template <bool SIGNED, int N>
void i_store_byte_pairs(uint8_t* high, uint8_t* low, const I (&q)[N]) = delete;

// Rounds rows x[r], n vectors each, to integers `high` (TERMS 1) or `2^RADIX * high + low` (TERMS 2); a unit is worth
// unit[r], NaN where a lane of `largest` is. `largest` holds lane maxima of |x|. From correction[r] is taken, lane by
// lane, mean * unit * integer: with mean * x in it before, what the rounding would lose against codes of that mean.
//
// SIGNED: one term in [-127, 127], or two in [-2^(RADIX-1), 2^(RADIX-1) - 1]. Otherwise x >= 0, terms in [0, 2^RADIX -
// 1].
template <int TERMS, int RADIX>
constexpr int kSignedLimit = (TERMS == 2 ? ((1 << (RADIX - 1)) - 1) * (1 << RADIX) : 0) + (1 << (RADIX - 1)) - 1;
template <int ROWS, int TERMS, int RADIX, bool SIGNED, int N>
[[gnu::always_inline]] inline void quantize_rows(const F (&x)[ROWS][kVectorsOf<N>], int n, const F (&largest)[ROWS],
                                                 float mean, uint8_t* codes, int code_stride, float* unit,
                                                 F (&correction)[ROWS]) {
  constexpr int kHalf = 1 << (RADIX - 1);
  constexpr float kLimit = static_cast<float>(SIGNED ? kSignedLimit<TERMS, RADIX> : (1 << (TERMS * RADIX)) - 1);
  constexpr int kStored = N % 4 == 0 && N > 0 ? 4 : 1;  // vectors that are stored together
  constexpr bool kPairs = TERMS == 2 && RADIX == 8 && kStored == 4;
  float top[4], inverse[4];
  f_reduce_max_positive_rows<ROWS>(largest, top);
  for (int r = 0; r < ROWS; ++r) {
    inverse[r] = top[r] > 0 ? kLimit / top[r] : 0.0f;
    unit[r] = top[r] * (1.0f / kLimit);
  }
  unrolled<ROWS>([&](auto r) KVBITS_INLINE {
    const F factor = f_set(inverse[r]);
    I total = i_zero();
    each_vector<N / kStored>(n / kStored, [&](auto group) KVBITS_INLINE {
      uint8_t* out = codes + r * code_stride + group * kStored * kWidth;
      I q[kStored], high[kStored], low[kStored];
      unrolled<kStored>([&](auto i) KVBITS_INLINE {
        q[i] = i_round(f_mul(x[r][group * kStored + i], factor));
        if (mean != 0) total = i_add(total, q[i]);
        if constexpr (TERMS == 2 && !kPairs) {
          high[i] = i_sra<RADIX>(SIGNED ? i_add(q[i], i_set(kHalf)) : q[i]);
          low[i] = i_sub(q[i], i_sll<RADIX>(high[i]));
        }
      });
      if constexpr (kPairs) {
        i_store_byte_pairs<SIGNED>(out, out + n * kWidth, q);
      } else if constexpr (TERMS == 2) {
        i_store_bytes<SIGNED>(out, high);
        i_store_bytes<SIGNED>(out + n * kWidth, low);
      } else {
        i_store_bytes<SIGNED>(out, q);
      }
    });
    if (mean != 0) correction[r] = f_fma(f_from(total), f_set(-mean * unit[r]), correction[r]);
  });
}
