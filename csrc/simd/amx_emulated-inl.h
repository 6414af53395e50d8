// amx-inl.h in plain C++, for tests on processors without tiles: what Intel's "Architecture Instruction Set Extensions
// Programming Reference" says of each instruction, traps included. Included by isa/*amx_emulated.cpp.

struct Tiles {
  TileConfig config;  // palette 0: not configured
  alignas(64) uint8_t data[8][16][64];
};
thread_local Tiles tiles{{0}, {}};

inline void trap_unless(bool legal) {
  if (!legal) __builtin_trap();
}
inline int rows_of(int tile) {
  trap_unless(tiles.config.palette == 1 && tiles.config.rows[tile] > 0 && tiles.config.row_bytes[tile] > 0);
  return tiles.config.rows[tile];
}

inline void tile_configure(const TileConfig& config) {
  trap_unless(config.palette == 1 && config.start_row == 0);
  for (int t = 0; t < 8; ++t) trap_unless(config.rows[t] <= 16 && config.row_bytes[t] <= 64);
  tiles.config = config;
  __builtin_memset(tiles.data, 0, sizeof tiles.data);
}
inline void tile_release() { tiles.config.palette = 0; }
template <int T>
inline void tile_zero() {
  rows_of(T);
  __builtin_memset(tiles.data[T], 0, sizeof tiles.data[T]);
}
template <int T>
inline void tile_load(const void* from, ptrdiff_t stride) {
  tile_zero<T>();
  for (int r = 0; r < rows_of(T); ++r) {
    __builtin_memcpy(tiles.data[T][r], static_cast<const uint8_t*>(from) + r * stride, tiles.config.row_bytes[T]);
  }
}
template <int T>
inline void tile_store(void* to, ptrdiff_t stride) {
  for (int r = 0; r < rows_of(T); ++r) {
    __builtin_memcpy(static_cast<uint8_t*>(to) + r * stride, tiles.data[T][r], tiles.config.row_bytes[T]);
  }
}

// body(row of the sums, row of A, columns of A) for each row, after the checks of every product.
template <int SUM, int A, int B, class Body>
inline void each_tile_row(const Body& body) {
  const auto& bytes = tiles.config.row_bytes;
  trap_unless(rows_of(SUM) == rows_of(A) && bytes[SUM] == bytes[B] && bytes[A] == 4 * rows_of(B));
  for (int m = 0; m < rows_of(SUM); ++m) body(tiles.data[SUM][m], tiles.data[A][m]);
  for (int m = rows_of(SUM); m < 16; ++m) __builtin_memset(tiles.data[SUM][m], 0, 64);
}

template <class TA, class TB, int SUM, int A, int B>
inline void add_bytes() {
  each_tile_row<SUM, A, B>([](uint8_t* sum, const uint8_t* a) {
    int32_t sums[16];
    __builtin_memcpy(sums, sum, 64);
    for (int k = 0; k < rows_of(B); ++k) {
      for (int n = 0; n < tiles.config.row_bytes[B] / 4; ++n) {
        for (int i = 0; i < 4; ++i) {
          sums[n] += static_cast<TA>(a[4 * k + i]) * static_cast<TB>(tiles.data[B][k][4 * n + i]);
        }
      }
    }
    __builtin_memcpy(sum, sums, 64);
  });
}
struct SignedUnsigned {
  template <int SUM, int A, int B>
  static void add() {
    add_bytes<int8_t, uint8_t, SUM, A, B>();
  }
};
struct UnsignedSigned {
  template <int SUM, int A, int B>
  static void add() {
    add_bytes<uint8_t, int8_t, SUM, A, B>();
  }
};

// Denormals are zeros, coming and going.
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
// The I-th bfloat16 of a pair in a row.
inline float tile_element(const uint8_t* row, int pair, int i) {
  uint16_t bits;
  __builtin_memcpy(&bits, row + 4 * pair + 2 * i, 2);
  return flushed(bf16_to_float(bits));
}

// First and second elements of the pairs are summed apart, from 0, each product fused with its sum; then the two
// together, and that to the tile.
struct Bfloat16 {
  template <int SUM, int A, int B>
  static void add() {
    each_tile_row<SUM, A, B>([](uint8_t* sum, const uint8_t* a) {
      float sums[16], parts[2][16] = {};
      __builtin_memcpy(sums, sum, 64);
      for (int k = 0; k < rows_of(B); ++k) {
        for (int i = 0; i < 2; ++i) {
          const float factor = tile_element(a, k, i);
          for (int n = 0; n < tiles.config.row_bytes[B] / 4; ++n) {
            parts[i][n] = flushed(__builtin_fmaf(factor, tile_element(tiles.data[B][k], n, i), parts[i][n]));
          }
        }
      }
      for (int n = 0; n < tiles.config.row_bytes[B] / 4; ++n) {
        sums[n] = flushed(flushed(sums[n]) + flushed(parts[0][n] + parts[1][n]));
      }
      __builtin_memcpy(sum, sums, 64);
    });
  }
};
