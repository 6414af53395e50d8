// Tiles of bytes beside 512-bit vectors: AMX-TILE and AMX-INT8. Included only by isa/products_amx.cpp, after
// avx512-inl.h.

// Tiles 0 to 3: sums of 16 rows and 16 outputs; 4, 5: two times 16 rows of inputs; 6, 7: two panels of 16 outputs.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's tile intrinsics do not say that they touch memory.
#define KVBITS_TILES_SEE(memory) __asm__ volatile("" ::"r"(memory) : "memory")

// For `rows` <= 32 rows and `depth` bytes of each.
inline void configure_tiles(int rows, int depth) {
  TileConfig config;
  const int halves[2] = {rows < 16 ? rows : 16, rows > 16 ? rows - 16 : 1};
  for (int i = 0; i < 2; ++i) {
    config.row_bytes[4 + i] = static_cast<uint16_t>(depth);
    config.rows[4 + i] = static_cast<uint8_t>(halves[i]);
    config.row_bytes[6 + i] = 64;
    config.rows[6 + i] = static_cast<uint8_t>(depth / 4);
    for (int p = 0; p < 2; ++p) {
      config.row_bytes[2 * i + p] = 64;
      config.rows[2 * i + p] = static_cast<uint8_t>(halves[i]);
    }
  }
  KVBITS_TILES_SEE(&config);
  _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }

// sums[panel][row][16] = signed inputs (rows of a cache line) times unsigned weights [panel][quad][16 outputs][4].
inline void multiply_tiles(const void* inputs, int rows, const uint8_t* weights, ptrdiff_t panel, int32_t* sums,
                           ptrdiff_t sums_panel) {
  KVBITS_TILES_SEE(weights);
  const auto* second = static_cast<const uint8_t*>(inputs) + 16 * 64;
  _tile_loadd(6, weights, 64);
  _tile_loadd(7, weights + panel, 64);
  _tile_loadd(4, inputs, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
  if (rows > 16) {
    _tile_loadd(5, second, 64);
    _tile_zero(2);
    _tile_zero(3);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + sums_panel, 64);
  if (rows > 16) {
    _tile_stored(2, sums + 16 * 16, 64);
    _tile_stored(3, sums + sums_panel + 16 * 16, 64);
  }
  KVBITS_TILES_SEE(sums);
}
