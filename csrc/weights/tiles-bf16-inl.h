// Products with bfloat16 weights on tiles of bfloat16, any number of rows: 32 inputs a step, in the order of the inputs.
// Sums stay in the tiles.

constexpr int kStepInputs = 32;
constexpr ptrdiff_t kPairBytes = 4 * kStrip;  // of a pair of inputs and all outputs of a strip
// How far ahead weights are asked for, into the second-level cache.
constexpr int kPairsAhead = 32 * kPairBytes;

// Tiles 0 to 3: sums of two blocks of up to 16 rows, by 16 outputs; 4 and 5: the blocks; 6 and 7: weights.
void begin_pairs(int rows) {
  TileConfig config;
  const int blocks[2] = {rows < kBlock ? rows : kBlock, rows > kBlock ? rows - kBlock : 1};
  for (int b = 0; b < 2; ++b) {
    config.shape(2 * b, blocks[b], 64);
    config.shape(2 * b + 1, blocks[b], 64);
    config.shape(4 + b, blocks[b], 64);
    config.shape(6 + b, kStepInputs / 2, 64);
  }
  tile_configure(config);
}

// x: rows `stride` bytes apart.
inline void add_step(const uint16_t* x, ptrdiff_t stride, bool both, const uint8_t* weights) {
  tile_load<4>(x, stride);
  tile_load<6>(weights, kPairBytes);
  Bfloat16::add<0, 4, 6>();
  tile_load<7>(weights + 64, kPairBytes);
  Bfloat16::add<1, 4, 7>();
  if (!both) return;
  tile_load<5>(reinterpret_cast<const uint8_t*>(x) + kBlock * stride, stride);
  Bfloat16::add<2, 5, 6>();
  Bfloat16::add<3, 5, 7>();
}

void multiply_pairs_on_tiles(const InputRows& tile, int rows, int in, const uint8_t* strip, float* out) {
  const bool both = rows > kBlock;
  tile_zero<0>();
  tile_zero<1>();
  if (both) tile_zero<2>(), tile_zero<3>();
  const uint16_t* x = tile.x;
  int i = 0;
  for (; i + kStepInputs <= in; i += kStepInputs, strip += kStepInputs / 2 * kPairBytes) {
    for (ptrdiff_t at = 0; at < kStepInputs / 2 * kPairBytes; at += 64) __builtin_prefetch(strip + at + kPairsAhead, 0, 2);
    add_step(x + i, 2 * tile.stride, both, strip);
  }
  if (const int rest = in - i; rest > 0) {  // zeros after the last inputs
    alignas(64) uint16_t last[2 * kBlock][kStepInputs] = {};
    alignas(64) uint8_t weights[kStepInputs / 2][kPairBytes] = {};
    for (int r = 0; r < rows; ++r) __builtin_memcpy(last[r], x + r * tile.stride + i, rest * sizeof(uint16_t));
    __builtin_memcpy(weights, strip, (rest + 1) / 2 * kPairBytes);
    add_step(last[0], sizeof last[0], both, weights[0]);
  }
  constexpr ptrdiff_t kRowBytes = kStrip * sizeof(float);
  tile_store<0>(out, kRowBytes);
  tile_store<1>(out + 16, kRowBytes);
  if (!both) return;
  tile_store<2>(out + kBlock * kStrip, kRowBytes);
  tile_store<3>(out + kBlock * kStrip + 16, kRowBytes);
}

RowKernels rows_on_tiles() {
  RowKernels rows = avx512bf16_rows();
  rows.isa = kTileIsa;
  rows.product = {2 * kBlock, false, multiply_pairs_on_tiles, begin_pairs, tile_release};
  return rows;
}
