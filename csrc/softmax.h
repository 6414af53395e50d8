// The float side of attention for one query row. Included inside a per-ISA anonymous namespace.

constexpr float kExpLeast = -87.0f;  // below it a weight is 0; exact no-ops for masked pages follow

// exp(x) for x <= 0 to 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes expf's coefficients).
inline F exp_negative(F x) {
  const F bounded = f_max(x, f_set(kExpLeast));
  const F n = f_round(f_mul(bounded, f_set(1.44269504088896341f)));
  F r = f_fma(n, f_set(-0.693359375f), bounded);
  r = f_fma(n, f_set(2.12194440e-4f), r);
  F p = f_set(1.9875691500e-4f);
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_fma(f_mul(p, r), r, f_add(r, f_set(1.0f)));
  return f_keep_if_ge(x, kExpLeast, f_scale2(p, n));
}

// One value through the same code as a vector's lanes.
inline float exp_negative_one(float x) {
  alignas(64) float lanes[kWidth];
  f_store(lanes, exp_negative(f_set(x)));
  return lanes[0];
}

// cap * tanh(x / cap) = cap * sign(x) (1 - e) / (1 + e), e = exp(-2 |x| / cap)
inline F soft_cap(F x, float cap) {
  const F size = f_abs(x);
  const F e = exp_negative(f_mul(size, f_set(-2.0f / cap)));
  const F one = f_set(1.0f);
  const F bounded = f_mul(f_div(f_sub(one, e), f_add(one, e)), f_set(cap));
  // Copy the sign: x / |x| would fail at 0, where `bounded` is 0 anyway.
  return f_sub(f_keep_if_ge(x, 0.0f, f_add(bounded, bounded)), bounded);
}

inline float softmax_page(float* scores, int first, int last, float softcap, QueryRow& row) {
  if (first >= last) {  // nothing of this page is visible: leave the row exactly as it is
    for (int i = 0; i < kPage; ++i) scores[i] = 0;
    return 1.0f;
  }
  if (softcap > 0) {
    for (int i = 0; i < kPage; i += kWidth) f_store(scores + i, soft_cap(f_load(scores + i), softcap));
  }
  for (int i = 0; i < first; ++i) scores[i] = -1e30f;
  for (int i = last; i < kPage; ++i) scores[i] = -1e30f;
  F most = f_load(scores);
  for (int i = kWidth; i < kPage; i += kWidth) most = f_max(most, f_load(scores + i));
  const float page_max = f_reduce_max(most);
  const float max = page_max > row.max ? page_max : row.max;
  F sum = f_set(0);
  for (int i = 0; i < kPage; i += kWidth) {
    const F weight = exp_negative(f_sub(f_load(scores + i), f_set(max)));
    f_store(scores + i, weight);
    sum = f_add(sum, weight);
  }
  const float keep = exp_negative_one(row.max - max);
  row.max = max;
  row.total = row.total * keep + f_reduce_add(sum);
  return keep;
}

inline void merge_rows(QueryRow& a, const QueryRow& b, int dim) {
  const float max = a.max > b.max ? a.max : b.max;
  const float keep_a = exp_negative_one(a.max - max), keep_b = exp_negative_one(b.max - max);
  a.max = max;
  a.total = a.total * keep_a + b.total * keep_b;
  for (int i = 0; i < dim; i += kWidth) {
    const F mine = f_mul(f_load(a.accumulator + i), f_set(keep_a));
    f_store(a.accumulator + i, f_fma(f_load(b.accumulator + i), f_set(keep_b), mine));
  }
}

inline void load_query(const void* source, Float dtype, float scale, int dim, float* out) {
  for (int i = 0; i < dim; i += kWidth) {
    const F x = dtype == Float::kF32 ? f_load(static_cast<const float*>(source) + i)
                                     : f_load_bf16(static_cast<const uint16_t*>(source) + i);
    f_store(out + i, f_mul(x, f_set(scale)));
  }
}

inline void store_output(const QueryRow& row, const float* sink, int dim, Float dtype, void* out) {
  float keep = 1.0f, total = row.total;
  if (sink != nullptr) {
    const float max = *sink > row.max ? *sink : row.max;
    keep = exp_negative_one(row.max - max);
    total = row.total * keep + exp_negative_one(*sink - max);
  }
  const float factor = keep / total;
  for (int i = 0; i < dim; ++i) {
    const float x = row.accumulator[i] * factor;
    if (dtype == Float::kF32) {
      static_cast<float*>(out)[i] = x;
    } else {
      static_cast<uint16_t*>(out)[i] = bf16_from_float(x);
    }
  }
}
