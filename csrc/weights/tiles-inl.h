// Products of many rows on tiles of bytes; the sums of a group are the same integers as in product-inl.h, and so are
// the results. Fewer rows than fill a tile's half go the way of vectors.
//
// A block of up to 16 rows meets 16 outputs, group after group; its results stay in registers. While tiles sum a
// group's products, vectors scale the sums of the one before.

constexpr int kTileRows = 32, kBlock = 16;
constexpr int kFewRows = kProductRows;
constexpr int kChunkGroups = 16;  // groups whose codes and scales lie unpacked side by side, in the first-level cache
constexpr int kHalfBytes = kGroup / 2;

using TileSums = int32_t[2][kBlock][16];  // by half of the group

// Tiles 0 and 1, 2 and 3: a group's halves' sums, by turns; 4 and 5 the rows' halves, 6 and 7 the weights'.
inline void configure_block(int rows) {
  TileConfig config;
  for (int t = 0; t < 4; ++t) config.shape(t, rows, 64);
  for (int h = 0; h < 2; ++h) {
    config.shape(4 + h, rows, kHalfBytes);
    config.shape(6 + h, kHalfBytes / 4, 64);
  }
  tile_configure(config);
}
inline int first_block(int rows) { return rows < kBlock ? rows : kBlock; }

void begin_tiles(int rows) {
  if (rows > kFewRows) configure_block(first_block(rows));
}

// One vector of outputs of some groups, unpacked. Codes with an offset are signed here, less the offset.
struct Chunk {
  alignas(64) uint8_t codes[kChunkGroups][kGroup / 4][64];
  alignas(64) float scale[kChunkGroups][2][kWidth], least[kChunkGroups][kWidth];
};

template <class Format, int STEP>
inline void unpack_step(const uint8_t* group, int lane, uint8_t (&codes)[kGroup / 4][64]) {
  B quads[2];
  load_quads<Format::kBits, STEP>(group, lane, quads);
  for (int q = 0; q < 2; ++q) {
    if (Format::kOffset > 0) quads[q] = _mm512_sub_epi8(quads[q], _mm512_set1_epi8(static_cast<char>(Format::kOffset)));
    _mm512_store_si512(codes[2 * STEP + q], quads[q]);
  }
}

template <class Format>
inline void unpack_group(const uint8_t* header, const uint8_t* group, int lane, int at, Chunk& chunk) {
  unrolled<4>([&](auto s) { unpack_step<Format, decltype(s)::value>(group, lane, chunk.codes[at]); });
  f_store(chunk.scale[at][0], load_scale<Format, 0>(header, group, lane));
  if constexpr (Format::kParams == Params::kSuperHalves) {
    f_store(chunk.scale[at][1], load_scale<Format, 1>(header, group, lane));
  }
  if constexpr (Format::kHasMin) f_store(chunk.least[at], load_min<Format>(header, group, lane));
}

// The halves' sums of a group, by the tiles of TURN.
template <class Format, int TURN>
inline void sum_on_tiles(const InputGroup* x, const uint8_t* codes, TileSums& sums) {
  using Product = std::conditional_t<(Format::kOffset > 0), SignedSigned, SignedUnsigned>;
  tile_load<4>(x->codes, sizeof *x);
  tile_load<6>(codes, 64);
  tile_zero<2 * TURN>();
  Product::template add<2 * TURN, 4, 6>();
  tile_load<5>(x->codes + kHalfBytes, sizeof *x);
  tile_load<7>(codes + kHalfBytes / 4 * 64, 64);
  tile_zero<2 * TURN + 1>();
  Product::template add<2 * TURN + 1, 5, 7>();
  tile_store<2 * TURN>(sums[0], 64);
  tile_store<2 * TURN + 1>(sums[1], 64);
}

// Of each row's result: the group's part added, in the order of product-inl.h.
template <class Format, int ROWS>
inline void add_sums(const InputGroup* x, const TileSums& sums, const Chunk& chunk, int at, F (&results)[ROWS]) {
  constexpr bool kOwnScales = Format::kParams == Params::kSuperHalves;
  const F scale = f_load(chunk.scale[at][0]);
  const F second_scale = kOwnScales ? f_load(chunk.scale[at][1]) : scale;
  const F least = Format::kHasMin ? f_load(chunk.least[at]) : f_set(0);
  unrolled<ROWS>([&](auto r) KVBITS_INLINE {
    F first = f_from(_mm512_load_si512(sums[0][r])), second = f_from(_mm512_load_si512(sums[1][r]));
    if (kOwnScales) first = f_mul(first, scale), second = f_mul(second, second_scale);
    const F product = f_fused(second, f_set(x[r].scale[1]), f_mul(first, f_set(x[r].scale[0])));
    results[r] = kOwnScales ? f_add(product, results[r]) : f_fused(product, scale, results[r]);
    if (Format::kHasMin) results[r] = f_fused(least, f_set(x[r].sum), results[r]);
  });
}

// ROWS rows of `rows` (what a tile holds) times a chunk; `stride` rows from a group's inputs to the next one's.
template <class Format, int ROWS>
inline void multiply_chunk(const InputGroup* x, int stride, const Chunk& chunk, int groups, bool begun, float* out) {
  alignas(64) TileSums sums[2];
  F results[ROWS];
  unrolled<ROWS>([&](auto r) { results[r] = begun ? f_load(out + decltype(r)::value * kStrip) : f_set(0); });
  sum_on_tiles<Format, 0>(x, chunk.codes[0][0], sums[0]);
  for (int g = 0; g < groups; g += 2) {
    const InputGroup *first = x + static_cast<ptrdiff_t>(g) * stride, *second = first + stride;
    if (g + 1 < groups) sum_on_tiles<Format, 1>(second, chunk.codes[g + 1][0], sums[1]);
    add_sums<Format>(first, sums[0], chunk, g, results);
    if (g + 1 == groups) break;
    if (g + 2 < groups) sum_on_tiles<Format, 0>(second + stride, chunk.codes[g + 2][0], sums[0]);
    add_sums<Format>(second, sums[1], chunk, g + 1, results);
  }
  unrolled<ROWS>([&](auto r) { f_store(out + decltype(r)::value * kStrip, results[r]); });
}

// With a block's number of rows as a constant.
template <class Format, int ROWS = kBlock>
inline void multiply_chunk_any(const InputGroup* x, int rows, int stride, const Chunk& chunk, int groups, bool begun,
                               float* out) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS) return multiply_chunk_any<Format, ROWS - 1>(x, rows, stride, chunk, groups, begun, out);
    multiply_chunk<Format, ROWS>(x, stride, chunk, groups, begun, out);
  }
}

template <class Format>
void multiply_on_tiles(const InputRows& tile, int rows, int in, const uint8_t* strip, float* out) {
  if (rows <= kFewRows) return multiply_coded<Format>(tile, rows, in, strip, out);
  constexpr int kSuperGroups = Format::kGroups;
  static_assert(kChunkGroups % kSuperGroups == 0);
  const int groups = (in + kGroup - 1) / kGroup;
  const int first = first_block(rows), rest = rows - first;
  Chunk chunk;
  for (int begin = 0; begin < groups; begin += kChunkGroups, strip += kChunkGroups / kSuperGroups * Format::kBlockBytes) {
    const int count = groups - begin < kChunkGroups ? groups - begin : kChunkGroups;
    const InputGroup* x = tile.groups + static_cast<ptrdiff_t>(begin) * rows;
    for (int lane = 0; lane < kStrip; lane += kWidth) {
      const uint8_t *header = strip, *group = strip + Format::kHeaderBytes;
      for (int g = 0; g < count; ++g, group += Format::kGroupBytes) {
        if (Format::kSuper && g % kSuperGroups == 0 && g > 0) {
          header = group;
          group += Format::kHeaderBytes;
        }
        for (int at = 0; at < Format::kGroupBytes / 2; at += 64) {
          __builtin_prefetch(group + at + lane / kWidth * (Format::kGroupBytes / 2) + kAheadBytes);
        }
        unpack_group<Format>(header, group, lane, g, chunk);
      }
      multiply_chunk_any<Format>(x, first, rows, chunk, count, begin > 0, out + lane);
      if (rest == 0) continue;
      if (rest != first) configure_block(rest);
      multiply_chunk_any<Format>(x + first, rest, rows, chunk, count, begin > 0, out + first * kStrip + lane);
      if (rest != first) configure_block(first);
    }
  }
}

template <class... F>
const ProductKernel* find_on_tiles(int format, FormatList<F...>) {
  static const ProductKernel kernels[] = {{kTileRows, true, multiply_on_tiles<F>, begin_tiles, tile_release}...};
  const int ids[] = {F::kId...};
  for (size_t i = 0; i < sizeof...(F); ++i) {
    if (ids[i] == format) return &kernels[i];
  }
  return nullptr;
}

const ProductKernel* tiles_of(int format) { return find_on_tiles(format, Formats{}); }

const ProductKernels kTileProducts = {kTileIsa, kTileRows, quantize_groups, tiles_of};
