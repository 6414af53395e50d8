// The small operand of an integer dot product: a query, or a page's softmax weights, as one or two byte terms.
// Included inside a per-ISA anonymous namespace.

// A float row as integers `radix * high + low`; one unit is worth `scale`. `sum` is the sum of the integers.
struct Quantized {
  float scale;
  float sum;
};

// Signed: |q| <= 2^(2 RADIX - 1) - 2^(RADIX - 1), both terms in [-2^(RADIX-1), 2^(RADIX-1) - 1].
template <int TERMS, int RADIX>
inline Quantized quantize_signed(const float* x, int n, uint8_t* high, uint8_t* low) {
  constexpr int kHalf = 1 << (RADIX - 1);
  constexpr float kLimit = TERMS == 2 ? static_cast<float>((kHalf - 1) * (1 << RADIX) + kHalf - 1) : kHalf - 1;
  F most = f_set(0);
  for (int i = 0; i < n; i += kWidth) most = f_max(most, f_abs(f_load(x + i)));
  const float top = f_reduce_max(most);
  const float inverse = top > 0 ? kLimit / top : 0.0f;
  I total = i_zero();
  for (int i = 0; i < n; i += kWidth) {
    const I q = i_round(f_mul(f_load(x + i), f_set(inverse)));
    total = i_add(total, q);
    if constexpr (TERMS == 2) {
      const I h = i_sra<RADIX>(i_add(q, i_set(kHalf)));
      i_store_bytes(high + i, h);
      i_store_bytes(low + i, i_sub(q, i_sll<RADIX>(h)));
    } else {
      i_store_bytes(high + i, q);
    }
  }
  return {top / kLimit, f_reduce_add(f_from(total))};
}

// Unsigned, for non-negative x: terms in [0, 2^RADIX - 1].
template <int TERMS, int RADIX>
inline Quantized quantize_unsigned(const float* x, int n, uint8_t* high, uint8_t* low) {
  constexpr float kLimit = static_cast<float>((1 << (TERMS * RADIX)) - 1);
  F most = f_set(0);
  for (int i = 0; i < n; i += kWidth) most = f_max(most, f_load(x + i));
  const float top = f_reduce_max(most);
  const float inverse = top > 0 ? kLimit / top : 0.0f;
  I total = i_zero();
  for (int i = 0; i < n; i += kWidth) {
    const I q = i_round(f_mul(f_load(x + i), f_set(inverse)));
    total = i_add(total, q);
    if constexpr (TERMS == 2) {
      const I h = i_sra<RADIX>(q);
      i_store_bytes(high + i, h);
      i_store_bytes(low + i, i_sub(q, i_sll<RADIX>(h)));
    } else {
      i_store_bytes(high + i, q);
    }
  }
  return {top / kLimit, f_reduce_add(f_from(total))};
}
