// Products of many rows on tiles of bytes; the sums of a group are the same integers as in product-inl.h, and so are
// the results. Up to 16 rows go the way of vectors, which is faster for them (Emerald Rapids, Q4_K, two threads: 8 rows
// 134 GMAC/s instead of 105, 512 rows 159 instead of 222).

constexpr int kTileRows = 32;
constexpr int kFewRows = 16;

using TileSums = int32_t[2][kTileRows][16];  // by panel of outputs

// Tiles 0 to 3: sums of 16 rows and 16 outputs; 4, 5: two times 16 rows of inputs, the first `input_bytes` of each; 6,
// 7: two panels of 16 outputs, `weight_rows` rows of quads or pairs. For `rows` <= 32 rows.
inline void configure_tiles(int rows, int input_bytes, int weight_rows) {
  TileConfig config;
  const int halves[2] = {rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 1};
  for (int i = 0; i < 2; ++i) {
    config.shape(4 + i, halves[i], input_bytes);
    config.shape(6 + i, weight_rows, 64);
    for (int p = 0; p < 2; ++p) config.shape(2 * i + p, halves[i], 64);
  }
  tile_configure(config);
}

void begin_halves(int rows) {
  if (rows > kFewRows) configure_tiles(rows, kGroup / 2, kGroup / 8);
}

// sums[panel][row][16] = signed inputs (rows of a cache line) times unsigned weights [panel][quad][16 outputs][4].
inline void multiply_tiles(const int8_t* inputs, int rows, const uint8_t* weights, ptrdiff_t panel, TileSums& sums) {
  tile_load<6>(weights, 64);
  tile_load<7>(weights + panel, 64);
  tile_load<4>(inputs, 64);
  tile_zero<0>();
  tile_zero<1>();
  SignedUnsigned::add<0, 4, 6>();
  SignedUnsigned::add<1, 4, 7>();
  if (rows > 16) {
    tile_load<5>(inputs + 16 * 64, 64);
    tile_zero<2>();
    tile_zero<3>();
    SignedUnsigned::add<2, 5, 6>();
    SignedUnsigned::add<3, 5, 7>();
  }
  tile_store<0>(sums[0][0], 64);
  tile_store<1>(sums[1][0], 64);
  if (rows > 16) {
    tile_store<2>(sums[0][16], 64);
    tile_store<3>(sums[1][16], 64);
  }
}

template <class Format, int PART>
inline void sum_half_on_tiles(const InputGroup* x, int rows, const uint8_t* group, TileSums& sums) {
  constexpr int kDepth = kGroup / 2;
  alignas(64) uint8_t codes[2][kDepth / 4][64];
  unrolled<2>([&](auto s) {
    constexpr int kStep = decltype(s)::value;
    for (int v = 0; v < 2; ++v) {
      B quads[2];
      load_quads<Format::kBits, 2 * PART + kStep>(group, v * kWidth, quads);
      _mm512_store_si512(codes[v][2 * kStep], quads[0]);
      _mm512_store_si512(codes[v][2 * kStep + 1], quads[1]);
    }
  });
  multiply_tiles(x->codes + PART * kDepth, rows, codes[0][0], sizeof codes[0], sums);
}

template <class Format>
inline void add_group_on_tiles(const InputGroup* x, int rows, const uint8_t* header, const uint8_t* group, float* out) {
  constexpr bool kOwnScales = Format::kParams == Params::kSuperHalves;
  alignas(64) TileSums sums[2];
  sum_half_on_tiles<Format, 0>(x, rows, group, sums[0]);
  sum_half_on_tiles<Format, 1>(x, rows, group, sums[1]);
  for (int v = 0; v < 2; ++v) {
    const F first_scale = load_scale<Format, 0>(header, group, v * kWidth);
    const F second_scale = load_scale<Format, 1>(header, group, v * kWidth);
    F least = f_set(0);
    if constexpr (Format::kHasMin) least = load_min<Format>(header, group, v * kWidth);
    for (int r = 0; r < rows; ++r) {
      F first = f_from(i_add(_mm512_load_si512(sums[0][v][r]), first_sum<Format, 0>(x[r])));
      F second = f_from(i_add(_mm512_load_si512(sums[1][v][r]), first_sum<Format, 1>(x[r])));
      if (kOwnScales) first = f_mul(first, first_scale), second = f_mul(second, second_scale);
      const F product = f_fused(second, f_set(x[r].scale[1]), f_mul(first, f_set(x[r].scale[0])));
      float* to = out + r * kStrip + v * kWidth;
      F result = kOwnScales ? f_add(product, f_load(to)) : f_fused(product, first_scale, f_load(to));
      if (Format::kHasMin) result = f_fused(least, f_set(x[r].sum), result);
      f_store(to, result);
    }
  }
}

template <class Format>
void multiply_on_tiles(const InputRows& tile, int rows, int in, const uint8_t* strip, float* out) {
  if (rows <= kFewRows) return multiply_coded<Format>(tile, rows, in, strip, out);
  for (int i = 0; i < rows * kStrip; ++i) out[i] = 0;
  const InputGroup* x = tile.groups;
  const uint8_t *header = strip, *group = strip + Format::kHeaderBytes;
  for (int g = 0; g < (in + kGroup - 1) / kGroup; ++g, x += rows, group += Format::kGroupBytes) {
    if (Format::kSuper && g % Format::kGroups == 0 && g > 0) {
      header = group;
      group += Format::kHeaderBytes;
    }
    add_group_on_tiles<Format>(x, rows, header, group, out);
  }
}

template <class... F>
const ProductKernel* find_on_tiles(int format, FormatList<F...>) {
  static const ProductKernel kernels[] = {{kTileRows, true, multiply_on_tiles<F>, begin_halves, tile_release}...};
  const int ids[] = {F::kId...};
  for (size_t i = 0; i < sizeof...(F); ++i) {
    if (ids[i] == format) return &kernels[i];
  }
  return nullptr;
}

const ProductKernel* tiles_of(int format) { return find_on_tiles(format, Formats{}); }

const ProductKernels kTileProducts = {kTileIsa, kTileRows, quantize_groups, tiles_of};
