// Products with bfloat16 weights on tiles of bfloat16, any number of rows: 32 inputs a step, in the order of the inputs.
// Sums stay in the tiles.

constexpr int kStepInputs = 32;
constexpr ptrdiff_t kPairBytes = 4 * kStrip;  // of a pair of inputs and all outputs of a strip
// How far ahead weights are asked for, into the second-level cache.
constexpr int kPairsAhead = 32 * kPairBytes;

void begin_pairs(int rows) { configure_tiles(rows, kStepInputs * sizeof(uint16_t), kStepInputs / 2); }

// x: rows `stride` bytes apart.
inline void add_step(const uint16_t* x, ptrdiff_t stride, bool both, const uint8_t* weights) {
  tile_load<4>(x, stride);
  tile_load<6>(weights, kPairBytes);
  Bfloat16::add<0, 4, 6>();
  tile_load<7>(weights + 64, kPairBytes);
  Bfloat16::add<1, 4, 7>();
  if (!both) return;
  tile_load<5>(reinterpret_cast<const uint8_t*>(x) + 16 * stride, stride);
  Bfloat16::add<2, 5, 6>();
  Bfloat16::add<3, 5, 7>();
}

void multiply_pairs_on_tiles(const InputRows& tile, int rows, int in, const uint8_t* strip, float* out) {
  const bool both = rows > 16;
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
    alignas(64) uint16_t last[2 * 16][kStepInputs] = {};
    alignas(64) uint8_t weights[kStepInputs / 2][kPairBytes] = {};
    for (int r = 0; r < rows; ++r) __builtin_memcpy(last[r], x + r * tile.stride + i, rest * sizeof(uint16_t));
    __builtin_memcpy(weights, strip, (rest + 1) / 2 * kPairBytes);
    add_step(last[0], sizeof last[0], both, weights[0]);
  }
  constexpr ptrdiff_t kRowBytes = kStrip * sizeof(float);
  tile_store<0>(out, kRowBytes);
  tile_store<1>(out + 16, kRowBytes);
  if (!both) return;
  tile_store<2>(out + 16 * kStrip, kRowBytes);
  tile_store<3>(out + 16 * kStrip + 16, kRowBytes);
}

RowKernels rows_on_tiles() {
  RowKernels rows = avx512bf16_rows();
  rows.isa = kTileIsa;
  rows.product = {kTileRows, false, multiply_pairs_on_tiles, begin_pairs, tile_release};
  return rows;
}
