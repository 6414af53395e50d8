// The small operand of an integer dot product: queries, or a page's softmax weights, as one or two byte terms.
// Included inside a per-ISA anonymous namespace. Rows go in lockstep: their dependency chains overlap.

// Rounds rows x[r][0..n) to integers `high` (TERMS 1) or `2^RADIX * high + low` (TERMS 2); a unit is worth unit[r].
// `most` holds lane maxima of |x|. correction[r] gains, lane by lane, `weight * (x - unit * integer)`: what the
// rounding would lose against codes whose mean is `weight`. sum[r] holds the lane sums of x.
//
// SIGNED: one term in [-127, 127], or two in [-2^(RADIX-1), 2^(RADIX-1) - 1]. Otherwise x >= 0, terms in [0, 2^RADIX -
// 1].
template <int ROWS, int TERMS, int RADIX, bool SIGNED>
inline void quantize_rows(const float* x, int stride, int n, const F (&most)[ROWS], const F (&sum)[ROWS], float weight,
                          uint8_t* codes, int code_stride, float* unit, F (&correction)[ROWS]) {
  constexpr int kHalf = 1 << (RADIX - 1);
  constexpr int kSignedLimit = TERMS == 2 ? (kHalf - 1) * (1 << RADIX) + kHalf - 1 : kHalf - 1;
  constexpr float kLimit = static_cast<float>(SIGNED ? kSignedLimit : (1 << (TERMS * RADIX)) - 1);
  float top[4], inverse[4];
  f_reduce_max_rows<ROWS>(most, top);
  for (int r = 0; r < ROWS; ++r) {
    inverse[r] = top[r] > 0 ? kLimit / top[r] : 0.0f;
    unit[r] = top[r] / kLimit;
  }
  I total[ROWS];
  for (int r = 0; r < ROWS; ++r) total[r] = i_zero();
  for (int i = 0; i < n; i += kWidth) {
    for (int r = 0; r < ROWS; ++r) {
      const I q = i_round(f_mul(f_load(x + r * stride + i), f_set(inverse[r])));
      total[r] = i_add(total[r], q);
      uint8_t* out = codes + r * code_stride + i;
      if constexpr (TERMS == 2) {
        const I high = i_sra<RADIX>(SIGNED ? i_add(q, i_set(kHalf)) : q);
        i_store_bytes(out, high);
        i_store_bytes(out + n, i_sub(q, i_sll<RADIX>(high)));
      } else {
        i_store_bytes(out, q);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    const F lost = f_fma(f_from(total[r]), f_set(-unit[r]), sum[r]);
    correction[r] = f_fma(lost, f_set(weight), correction[r]);
  }
}
