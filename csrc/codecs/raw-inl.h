// bfloat16 pages (src/kvbits/codecs/raw.py): exact products in float. Included inside a per-ISA anonymous namespace.

// The two elements of each lane of pair `pair`, for VECTORS vectors of lanes from `lane` on.
template <int VECTORS>
inline void load_pairs(const uint8_t* page, ptrdiff_t ahead, int lanes, int pair, int lane, F (&even)[VECTORS],
                       F (&odd)[VECTORS]) {
  unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
    const B both = b_stream(page + (static_cast<size_t>(pair) * lanes + lane + v * kWidth) * 4, ahead);
    even[v] = b_even(both);
    odd[v] = b_odd(both);
  });
}

template <int VECTORS>
inline void add_pairs(const float* factors, const F (&even)[VECTORS], const F (&odd)[VECTORS], F (&sum)[VECTORS]) {
  const F first = f_set(factors[0]), second = f_set(factors[1]);
  unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
    sum[v] = f_fma(even[v], first, sum[v]);
    sum[v] = f_fma(odd[v], second, sum[v]);
  });
}

struct RawKey {
  static constexpr int kId = 0;
  static void prepare(QueryRow&, int) {}

  struct Folded {};
  template <int ROWS>
  static void fold(const Block&, int, Folded&) {}

  template <int ROWS>
  static void score_rows(const Block& block, int dim, const Folded&) {
    constexpr int kVectors = lane_vectors(ROWS, 2, kRegisters * 3 / 4);
    for (int lane = 0; lane < kPage; lane += kWidth * kVectors) {
      F sum[ROWS][kVectors];
      unrolled<ROWS>([&](auto r)
                         KVBITS_INLINE { unrolled<kVectors>([&](auto v) KVBITS_INLINE { sum[r][v] = f_set(0); }); });
      for (int pair = 0; pair < dim / 2; ++pair) {
        F even[kVectors], odd[kVectors];
        load_pairs(block.keys, block.ahead, kPage, pair, lane, even, odd);
        unrolled<ROWS>([&](auto r) KVBITS_INLINE { add_pairs(block.rows[r].query + 2 * pair, even, odd, sum[r]); });
      }
      unrolled<ROWS>([&](auto r) KVBITS_INLINE {
        unrolled<kVectors>([&](auto v)
                               KVBITS_INLINE { f_store(block.scores + r * kPage + lane + v * kWidth, sum[r][v]); });
      });
    }
  }

  static void seal(const uint8_t* open_page, int dim, const Rounding&, uint8_t* out) {
    __builtin_memcpy(out, open_page, static_cast<size_t>(kPage) * dim * 2);
  }
};

struct RawValue {
  struct Folded {};
  template <int ROWS>
  static void fold(const Block&, int, Folded&) {}

  template <int ROWS>
  static void accumulate_rows(const Block& block, int dim, const Folded&) {
    constexpr int kVectors = lane_vectors(ROWS, 2, kRegisters * 3 / 4);
    int lane = 0;
    for (; lane + kWidth * kVectors <= dim; lane += kWidth * kVectors) {
      accumulate_lanes<ROWS, kVectors>(block, dim, lane);
    }
    for (; lane < dim; lane += kWidth) accumulate_lanes<ROWS, 1>(block, dim, lane);
  }

  static void seal(const uint8_t* open_page, int dim, const Rounding& rounding, uint8_t* out) {
    RawKey::seal(open_page, dim, rounding, out);
  }

 private:
  template <int ROWS, int VECTORS>
  static void accumulate_lanes(const Block& block, int dim, int lane) {
    F sum[ROWS][VECTORS];
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
        sum[r][v] = f_mul(f_load(block.rows[r].accumulator + lane + v * kWidth), f_set(block.rescale[r]));
      });
    });
    for (int pair = 0; pair < kPage / 2; ++pair) {
      F even[VECTORS], odd[VECTORS];
      load_pairs(block.values, block.ahead, dim, pair, lane, even, odd);
      unrolled<ROWS>([&](auto r) KVBITS_INLINE { add_pairs(block.scores + r * kPage + 2 * pair, even, odd, sum[r]); });
    }
    unrolled<ROWS>([&](auto r) KVBITS_INLINE {
      unrolled<VECTORS>([&](auto v)
                            KVBITS_INLINE { f_store(block.rows[r].accumulator + lane + v * kWidth, sum[r][v]); });
    });
  }
};
