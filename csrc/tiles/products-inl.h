// Products of a block of rows with a page on tiles. Included inside a per-ISA anonymous namespace, after
// simd/avx512-inl.h and the tiles.
//
// Tiles 0 to 3 are sums of up to kManyRows rows and 16 lanes; 4 and 5 the rows' terms, 64 bytes of the reduced
// dimension of each; 6 and 7 16 quads of bytes (or pairs of bfloat16) of 16 lanes. That is the order in which a page's
// planes lie, so 8 bytes wide and 16 bit pages are loaded as they are or, like all others, unpacked once a page.

constexpr int kTileBytes = 1024;
constexpr int kTileSums = 4;
using TileSums = uint32_t[kTileSums][kManyRows][16];

inline void begin_tiles(int rows) {
  TileConfig config;
  for (int t = 0; t < kTileSums + 2; ++t) config.shape(t, rows, 64);
  for (int t = kTileSums + 2; t < 8; ++t) config.shape(t, 16, 64);
  tile_configure(config);
}

constexpr int padded(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// A block's rows: term t of row r at `at` + r * row + t * term.
struct TileRows {
  const void* at;
  ptrdiff_t row, term;
};
// A page: row q of the tile of step s and vector v at `at` + s * step + v * vector + q * row. What lies `ahead` bytes
// behind each row is asked for with it; 0: nothing is.
struct TilePage {
  const uint8_t* at;
  ptrdiff_t row, vector, step, ahead = 0;
  TilePage from(int vectors) const { return {at + vectors * vector, row, vector, step, ahead}; }
};
// Tiles that lie side by side, one step's after another's.
inline TilePage unpacked_page(const uint8_t* at, int lanes) { return {at, 64, kTileBytes, lanes / 16 * kTileBytes}; }

// sums[t * VECTORS + v] = term t times vector v of the page, `steps` tiles of the reduced dimension in order. Rows with
// more steps than the page meet it again from its start.
template <class Product, int TERMS, int VECTORS>
inline void multiply_page(const TileRows& rows, const TilePage& page, int steps, int page_steps, TileSums& sums) {
  static_assert(TERMS * VECTORS <= kTileSums && TERMS <= 2);
  unrolled<TERMS * VECTORS>([](auto i) KVBITS_INLINE { tile_zero<i>(); });
  for (int s = 0, p = 0; s < steps; ++s, p = p + 1 < page_steps ? p + 1 : 0) {
    const auto* from = static_cast<const uint8_t*>(rows.at) + s * 64;
    unrolled<TERMS>([&](auto t) KVBITS_INLINE { tile_load<kTileSums + t>(from + t * rows.term, rows.row); });
    unrolled<VECTORS>([&](auto v) KVBITS_INLINE {
      const uint8_t* tile = page.at + p * page.step + v * page.vector;
      tile_load<kTileSums + 2 + v % 2>(tile, page.row);
      if (page.ahead != 0 && s < page_steps) {
        for (int q = 0; q < 16; ++q) __builtin_prefetch(tile + q * page.row + page.ahead, 0, 2);
      }
      unrolled<TERMS>([&](auto t) KVBITS_INLINE {
        Product::template add<t * VECTORS + v, kTileSums + t, kTileSums + 2 + v % 2>();
      });
    });
  }
  unrolled<TERMS * VECTORS>([&](auto i) KVBITS_INLINE { tile_store<i>(sums[i], 64); });
}

// body(first vector, vectors at once) over `vectors` vectors of lanes.
template <int AT_ONCE, class Body>
inline void each_vectors(int vectors, const Body& body) {
  int v = 0;
  for (; v + AT_ONCE <= vectors; v += AT_ONCE) body(v, std::integral_constant<int, AT_ONCE>{});
  for (; v < vectors; ++v) body(v, std::integral_constant<int, 1>{});
}

// The block's rows from `begin` on, up to kBlockRows of them.
inline Block rows_from(const Block& block, int begin) {
  const int rest = block.count - begin;
  Block part = block;
  part.count = rest < kBlockRows ? rest : kBlockRows;
  part.rows += begin;
  part.scores += begin * kPage;
  part.rescale += begin;
  if (begin > 0) part.ahead = 0, part.first = false;
  return part;
}

// body(rows from the block's `begin`-th on, begin, their number as a constant), a few at a time.
template <class Body>
inline void each_few_rows(const Block& block, const Body& body) {
  for (int begin = 0; begin < block.count; begin += kBlockRows) {
    const Block part = rows_from(block, begin);
    with_rows(part.count, [&](auto rows) { body(part, begin, rows); });
  }
}

// Where the kernels of tiles keep a page that they unpacked; before it lies what the vectors' keep.
constexpr size_t kUnpackedBytes = static_cast<size_t>(kPage) * kMaxDim * 2;
static_assert(kKeptBytes % 64 == 0);
inline uint8_t* kept_keys(const Block& block) { return block.kept + kKeptBytes; }
inline uint8_t* kept_values(const Block& block) { return kept_keys(block) + kUnpackedBytes; }

// The row-th of a tile's rows, of all steps, in an unpacked page.
inline uint8_t* unpacked_row(uint8_t* out, int lanes, int row, int lane) {
  return out + (row / 16 * (lanes / 16) + lane / 16) * kTileBytes + row % 16 * 64;
}
