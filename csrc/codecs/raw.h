// bfloat16 pages (src/kvbits/codecs/raw.py): exact products in float. Included inside a per-ISA anonymous namespace.

struct RawKey {
  static void prepare(QueryRow&, int) {}

  template <int ROWS>
  static void score_rows(const uint8_t* page, int dim, const QueryRow* rows, float* scores) {
    constexpr int kStep = kWidth * kLaneBlock;
    for (int lane = 0; lane < kPage; lane += kStep) {
      F sum[ROWS][kLaneBlock];
      for (auto& row : sum)
        for (F& s : row) s = f_set(0);
      for (int pair = 0; pair < dim / 2; ++pair) {
        for (int b = 0; b < kLaneBlock; ++b) {
          const B v = b_load(page + (static_cast<size_t>(pair) * kPage + lane + b * kWidth) * 4);
          const F even = b_even(v), odd = b_odd(v);
          for (int r = 0; r < ROWS; ++r) {
            sum[r][b] = f_fma(even, f_set(rows[r].query[2 * pair]), sum[r][b]);
            sum[r][b] = f_fma(odd, f_set(rows[r].query[2 * pair + 1]), sum[r][b]);
          }
        }
      }
      for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < kLaneBlock; ++b) f_store(scores + r * kPage + lane + b * kWidth, sum[r][b]);
    }
  }

  static void seal(const uint8_t* open_page, int dim, uint8_t* out) {
    __builtin_memcpy(out, open_page, static_cast<size_t>(kPage) * dim * 2);
  }
};

struct RawValue {
  template <int ROWS>
  static void accumulate_rows(const uint8_t* page, int dim, QueryRow* rows, const float* weights, const float* keep) {
    for (int lane = 0; lane < dim; lane += kWidth) {
      F sum[ROWS];
      for (int r = 0; r < ROWS; ++r) sum[r] = f_mul(f_load(rows[r].accumulator + lane), f_set(keep[r]));
      for (int pair = 0; pair < kPage / 2; ++pair) {
        const B v = b_load(page + (static_cast<size_t>(pair) * dim + lane) * 4);
        const F even = b_even(v), odd = b_odd(v);
        for (int r = 0; r < ROWS; ++r) {
          sum[r] = f_fma(even, f_set(weights[r * kPage + 2 * pair]), sum[r]);
          sum[r] = f_fma(odd, f_set(weights[r * kPage + 2 * pair + 1]), sum[r]);
        }
      }
      for (int r = 0; r < ROWS; ++r) f_store(rows[r].accumulator + lane, sum[r]);
    }
  }

  static void seal(const uint8_t* open_page, int dim, uint8_t* out) { RawKey::seal(open_page, dim, out); }
};
