// The float side of attention. Included inside a per-ISA anonymous namespace.
//
// Scores are in units of ln 2 (load_query multiplies by 1 / ln 2), so a weight is a power of two.

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kMasked = -__builtin_inff();
constexpr float kExp2Least = -125.0f;  // below it a weight is 0

// 2^x for x <= 0, to 2e-7; exactly 1 at 0 and 0 far below it; NaN for NaN, which so reaches the row's sum and result.
// The polynomial is the minimax one of relative error on
// [-1/2, 1/2] with constant term 1.
inline F exp2_negative(F x) {
  const F n = f_round(x);
  const F r = f_sub(x, n);
  F p = f_set(1.326472753255555e-3f);
  p = f_fma(p, r, f_set(9.671512709484877e-3f));
  p = f_fma(p, r, f_set(5.550733742003984e-2f));
  p = f_fma(p, r, f_set(2.402224208385461e-1f));
  p = f_fma(p, r, f_set(6.931469776002867e-1f));
  p = f_fma(p, r, f_set(1.0f));
  return f_scale2_from(p, n, kExp2Least);
}

// One value through the same code as a vector's lanes.
inline float exp2_negative_one(float x) {
  alignas(64) float lanes[kWidth];
  f_store(lanes, exp2_negative(f_set(x)));
  return lanes[0];
}

// x in units of ln 2: cap * tanh(x / cap) = cap * sign(x) (1 - e) / (1 + e), e = exp(-2 |x| / cap)
inline F soft_cap(F x, float cap) {
  const F e = exp2_negative(f_mul(f_abs(x), f_set(-2.0f / cap)));
  const F one = f_set(1.0f);
  const F bounded = f_mul(f_div(f_sub(one, e), f_add(one, e)), f_set(cap * kLog2E));
  // Copy the sign: x / |x| would fail at 0, where `bounded` is 0 anyway.
  return f_sub(f_keep_if_ge(x, 0.0f, f_add(bounded, bounded)), bounded);
}

// Bytes of the block to come that are asked for meanwhile, from kKeysSkipped on: memory would else rest until the next
// products.
constexpr int kAskedBytes = 1536, kKeysSkipped = 512;

template <int ROWS>
inline void softmax_rows(const Block& block, const int* first, const int* last, float softcap) {
  float* scores = block.scores;
  QueryRow* rows = block.rows;
  for (int r = 0; r < ROWS; ++r) {
    float* s = scores + r * kPage;
    if (softcap > 0) {
      for (int i = 0; i < kPage; i += kWidth) f_store(s + i, soft_cap(f_load(s + i), softcap));
    }
    // A row that sees nothing of the page stays exactly as it is: all weights 0, rescaled by 1.
    const int begin = first[r] < last[r] ? first[r] : kPage;
    for (int i = 0; i < begin; ++i) s[i] = kMasked;
    for (int i = last[r] > begin ? last[r] : begin; i < kPage; ++i) s[i] = kMasked;
  }
  F m[ROWS];
  for (int r = 0; r < ROWS; ++r) m[r] = f_load(scores + r * kPage);
  for (int i = kWidth; i < kPage; i += kWidth)
    for (int r = 0; r < ROWS; ++r) m[r] = f_max(m[r], f_load(scores + r * kPage + i));
  float top[4];
  f_reduce_max_rows<ROWS>(m, top);

  alignas(64) float shrink[kLanes] = {};
  for (int r = 0; r < ROWS; ++r) {
    top[r] = top[r] > rows[r].max ? top[r] : rows[r].max;
    shrink[r] = rows[r].max - top[r];
    rows[r].max = top[r];
  }
  for (int i = 0; i < ROWS; i += kWidth) f_store(shrink + i, exp2_negative(f_load(shrink + i)));
  F total[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    block.rescale[r] = shrink[r];
    total[r] = f_mul(f_load(rows[r].total), f_set(shrink[r]));
  }
  for (int i = 0; i < kPage; i += kWidth) {
    if (block.ahead != 0) {
      constexpr int kStep = kAskedBytes / (kPage / kWidth);
      const uint8_t* asked = block.keys + block.ahead + kKeysSkipped + i / kWidth * kStep;
      for (int k = 0; k < kStep; k += 64) __builtin_prefetch(asked + k, 0, 2);
    }
    for (int r = 0; r < ROWS; ++r) {
      const F weight = exp2_negative(f_sub(f_load(scores + r * kPage + i), f_set(top[r])));
      f_store(scores + r * kPage + i, weight);
      total[r] = f_add(total[r], weight);
    }
  }
  for (int r = 0; r < ROWS; ++r) f_store(rows[r].total, total[r]);
}

inline void softmax_any(const Block& block, const int* first, const int* last, float softcap) {
  with_rows(block.count, [&](auto rows) { softmax_rows<rows>(block, first, last, softcap); });
}

inline void merge_rows(QueryRow& a, const QueryRow& b, int dim) {
  const float max = a.max > b.max ? a.max : b.max;
  const F alpha_a = f_set(exp2_negative_one(a.max - max)), alpha_b = f_set(exp2_negative_one(b.max - max));
  a.max = max;
  f_store(a.total, f_fma(f_load(b.total), alpha_b, f_mul(f_load(a.total), alpha_a)));
  for (int i = 0; i < dim; i += kWidth) {
    f_store(a.accumulator + i, f_fma(f_load(b.accumulator + i), alpha_b, f_mul(f_load(a.accumulator + i), alpha_a)));
  }
}

inline void load_query(const void* source, Float dtype, float scale, int dim, float* out) {
  const F factor = f_set(scale * kLog2E);
  for (int i = 0; i < dim; i += kWidth) {
    const F x = dtype == Float::kF32 ? f_load(static_cast<const float*>(source) + i)
                                     : f_load_bf16(static_cast<const uint16_t*>(source) + i);
    f_store(out + i, f_mul(x, factor));
  }
}

inline void store_output(const QueryRow& row, const float* sink, int dim, Float dtype, void* out) {
  float alpha = 1.0f, total = f_reduce_add(f_load(row.total));
  if (sink != nullptr) {
    const float logit = *sink * kLog2E;
    const float max = logit > row.max ? logit : row.max;
    alpha = exp2_negative_one(row.max - max);
    total = total * alpha + exp2_negative_one(logit - max);
  }
  const float factor = alpha / total;
  for (int i = 0; i < dim; ++i) {
    const float x = row.accumulator[i] * factor;
    if (dtype == Float::kF32) {
      static_cast<float*>(out)[i] = x;
    } else {
      static_cast<uint16_t*>(out)[i] = bf16_from_float(x);
    }
  }
}
