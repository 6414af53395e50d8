// Products of weights in bits with inputs as they are, in bfloat16, on tiles of bfloat16.
//
// Codes are integers that bfloat16 holds: of up to 6 bits as 128 + code, which takes no conversion, of 8 bits less their
// offset. A group's sums are the tile's: over the first and over the second elements of the pairs of inputs, apart, and
// then together. A result is, group after group, fused(least, sum of the inputs, before) and fused(sum, scale, before);
// where the halves' weights have scales of their own, for each half. Few rows meet vectors that do the same in the same
// order, to the bit. Denormals are zeros for tiles, and so for vectors here.
//
// Sums of bytes, as product-inl.h has them, would need a tile for 16 inputs; the vectors' work on its sums then takes
// as long as without tiles (Emerald Rapids).

constexpr int kBlock = 16;     // rows that a tile holds
constexpr int kTileRows = 64;  // rows that meet weights unpacked once
constexpr int kFewRows = kProductRows;
constexpr int kChunkGroups = 16;  // groups that lie unpacked side by side, in the first-level cache

template <class Format>
constexpr bool kHalves = Format::kParams == Params::kSuperHalves;
template <class Format>
constexpr int kPieces = kHalves<Format> ? 2 : 1;  // of a group, each with a scale
template <class Format>
constexpr bool kLifted = Format::kBits < 8;
constexpr int kLift = 128;

// Of a group and a row of inputs: their sums, half by half. What InputRows::groups points to here.
struct InputSums {
  float half[2];
};
inline const InputSums* sums_of(const InputRows& tile) { return reinterpret_cast<const InputSums*>(tile.groups); }

void sum_groups(const uint16_t* x, int in, ptrdiff_t stride, void* out) {
  auto* sums = static_cast<InputSums*>(out);
  for (int begin = 0; begin < in; begin += kGroup, sums += stride) {
    for (int h = 0; h < 2; ++h) {
      float sum = 0;
      for (int i = begin + h * kGroup / 2; i < begin + (h + 1) * kGroup / 2 && i < in; ++i) sum += bf16_to_float(x[i]);
      sums->half[h] = sum;
    }
  }
}

class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // results and operands
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

// Scales of a group's pieces, and what the inputs' sums meet: minima, less what codes were lifted by.
template <class Format>
inline void load_params(const uint8_t* header, const uint8_t* group, int lane, F (&scale)[2], F (&least)[2]) {
  constexpr float kRest = kLifted<Format> ? kLift + Format::kOffset : 0;
  scale[0] = load_scale<Format, 0>(header, group, lane);
  if constexpr (kHalves<Format>) scale[1] = load_scale<Format, 1>(header, group, lane);
  F min = f_set(0);
  if constexpr (Format::kHasMin) min = load_min<Format>(header, group, lane);
  for (int p = 0; p < kPieces<Format>; ++p) least[p] = f_fused(f_set(-kRest), scale[p], min);
}

// The BYTE-th codes of quads as floats.
template <class Format, int BYTE>
inline F byte_as_float(B quads) {
  if constexpr (kLifted<Format>) {
    const B moved = BYTE < 2 ? _mm512_slli_epi32(quads, 16 - 8 * BYTE) : _mm512_srli_epi32(quads, 8 * BYTE - 16);
    const B mask = _mm512_set1_epi32(0xff0000), lift = _mm512_set1_epi32(0x43000000);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(moved, mask, lift, 0xea));  // moved & mask | lift
  } else {
    const B code = _mm512_and_si512(_mm512_srli_epi32(quads, 8 * BYTE), _mm512_set1_epi32(0xff));
    return f_from(_mm512_sub_epi32(code, _mm512_set1_epi32(Format::kOffset)));
  }
}

// Quads of codes as two rows of pairs of bfloat16.
template <class Format>
inline void store_pairs(B quads, uint8_t (*out)[64]) {
  if constexpr (kLifted<Format>) {
    const B first = _mm512_set1_epi32(0xff), codes = _mm512_set1_epi32(0xff00ff), lift = _mm512_set1_epi32(0x43004300);
    for (int p = 0; p < 2; ++p, quads = _mm512_srli_epi32(quads, 16)) {
      const B apart = _mm512_ternarylogic_epi32(first, quads, _mm512_slli_epi32(quads, 8), 0xca);  // first ? quads : ...
      _mm512_store_si512(out[p], _mm512_ternarylogic_epi32(apart, codes, lift, 0xea));
    }
  } else {
    const auto join = [](F low, F high) {  // the floats are exact in 16 bits
      const B upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
      return _mm512_ternarylogic_epi32(upper, _mm512_castps_si512(high),
                                       _mm512_srli_epi32(_mm512_castps_si512(low), 16), 0xca);
    };
    _mm512_store_si512(out[0], join(byte_as_float<Format, 0>(quads), byte_as_float<Format, 1>(quads)));
    _mm512_store_si512(out[1], join(byte_as_float<Format, 2>(quads), byte_as_float<Format, 3>(quads)));
  }
}

// visit(group, its header, its codes) for `count` groups from the beginning of a block on.
template <class Format, class Visit>
inline void each_group(const uint8_t* strip, int count, const Visit& visit) {
  const uint8_t *header = strip, *group = strip + Format::kHeaderBytes;
  for (int g = 0; g < count; ++g, group += Format::kGroupBytes) {
    if (Format::kSuper && g % Format::kGroups == 0 && g > 0) {
      header = group;
      group += Format::kHeaderBytes;
    }
    visit(g, header, group);
  }
}

// Few rows, all by vectors.
template <class Format, int ROWS>
void multiply_few(const InputRows& tile, int in, const uint8_t* strip, float* out) {
  F results[ROWS][kStripVectors];
  unrolled<ROWS>([&](auto r) { unrolled<kStripVectors>([&](auto v) { results[r][v] = f_set(0); }); });
  const InputSums* sums = sums_of(tile);
  each_group<Format>(strip, (in + kGroup - 1) / kGroup, [&](int g, const uint8_t* header, const uint8_t* group) {
    for (int at = 0; at < Format::kGroupBytes; at += 64) __builtin_prefetch(group + at + kAheadBytes);
    alignas(64) float x[ROWS][kGroup];
    const int there = in - g * kGroup < kGroup ? in - g * kGroup : kGroup;
    unrolled<ROWS>([&](auto r) {
      alignas(64) uint16_t last[kGroup] = {};
      const uint16_t* from = tile.x + decltype(r)::value * tile.stride + g * kGroup;
      if (there < kGroup) {
        __builtin_memcpy(last, from, there * sizeof(uint16_t));
        from = last;
      }
      f_store(x[r], f_load_bf16(from));
      f_store(x[r] + kWidth, f_load_bf16(from + kWidth));
    });
    unrolled<kStripVectors>([&](auto v) {
      constexpr int kLane = decltype(v)::value * kWidth;
      F scale[2], least[2], parts[ROWS][2];
      load_params<Format>(header, group, kLane, scale, least);
      const auto begin = [&] { unrolled<ROWS>([&](auto r) { parts[r][0] = parts[r][1] = f_set(0); }); };
      const auto end = [&](auto p) {
        unrolled<ROWS>([&](auto r) {
          const InputSums& s = sums[g * tile.rows + decltype(r)::value];
          const float sum = kHalves<Format> ? s.half[p] : s.half[0] + s.half[1];
          results[r][v] = f_fused(least[p], f_set(sum), results[r][v]);
          results[r][v] = f_fused(f_add(parts[r][0], parts[r][1]), scale[p], results[r][v]);
        });
      };
      begin();
      unrolled<4>([&](auto s) {
        constexpr int kStep = decltype(s)::value;
        if constexpr (kHalves<Format> && kStep == 2) {
          end(std::integral_constant<int, 0>{});
          begin();
        }
        B quads[2];
        load_quads<Format::kBits, kStep>(group, kLane, quads);
        unrolled<2>([&](auto q) {
          unrolled<4>([&](auto b) {
            constexpr int kByte = decltype(b)::value, kInput = 8 * kStep + 4 * decltype(q)::value + kByte;
            const F code = byte_as_float<Format, kByte>(quads[q]);
            unrolled<ROWS>([&](auto r) {
              parts[r][kByte % 2] = f_fused(f_set(x[r][kInput]), code, parts[r][kByte % 2]);
            });
          });
        });
      });
      end(std::integral_constant<int, kPieces<Format> - 1>{});
    });
  });
  unrolled<ROWS>([&](auto r) {
    unrolled<kStripVectors>([&](auto v) {
      f_store(out + decltype(r)::value * kStrip + decltype(v)::value * kWidth, results[r][v]);
    });
  });
}

template <class Format, int ROWS = kFewRows>
void multiply_few_any(const InputRows& tile, int in, const uint8_t* strip, float* out) {
  if constexpr (ROWS > 0) {
    if (tile.rows < ROWS) return multiply_few_any<Format, ROWS - 1>(tile, in, strip, out);
    multiply_few<Format, ROWS>(tile, in, strip, out);
  }
}

// Tiles 0 and 1, 2 and 3: sums of the pieces, by turns; 4 and 5: the rows' inputs; 6 and 7: weights.
template <int PIECES>
inline void configure_block(int rows) {
  TileConfig config;
  for (int t = 0; t < 4; ++t) config.shape(t, rows, 64);
  for (int p = 0; p < 2; ++p) {
    config.shape(4 + p, rows, kGroup * sizeof(uint16_t) / PIECES);
    config.shape(6 + p, kGroup / 2 / PIECES, 64);
  }
  tile_configure(config);
}
template <int PIECES>
void begin_blocks(int rows) {
  if (rows > kFewRows) configure_block<PIECES>(rows < kBlock ? rows : kBlock);
}

// A vector of outputs of some groups, unpacked.
struct Chunk {
  alignas(64) uint8_t pairs[kChunkGroups][kGroup / 2][64];
  F scale[kChunkGroups][2], least[kChunkGroups][2];
};

template <class Format>
inline void unpack_group(const uint8_t* header, const uint8_t* group, int lane, int at, Chunk& chunk) {
  unrolled<4>([&](auto s) {
    constexpr int kStep = decltype(s)::value;
    B quads[2];
    load_quads<Format::kBits, kStep>(group, lane, quads);
    for (int q = 0; q < 2; ++q) store_pairs<Format>(quads[q], chunk.pairs[at] + 4 * kStep + 2 * q);
  });
  load_params<Format>(header, group, lane, chunk.scale[at], chunk.least[at]);
}

using BlockSums = float[2][kBlock][kWidth];  // by piece

// x: a group's inputs of a block's rows, `stride` bytes apart.
template <int PIECES, int TURN>
inline void sum_on_tiles(const uint16_t* x, ptrdiff_t stride, const uint8_t (*pairs)[64], BlockSums& sums) {
  unrolled<PIECES>([&](auto p) {
    constexpr int kPiece = decltype(p)::value, kSum = 2 * TURN + kPiece;
    tile_load<4 + kPiece>(x + kPiece * kGroup / 2, stride);
    tile_load<6 + kPiece>(pairs + kPiece * kGroup / 4, 64);
    tile_zero<kSum>();
    Bfloat16::add<kSum, 4 + kPiece, 6 + kPiece>();
    tile_store<kSum>(sums[kPiece], 64);
  });
}

// A block's rows times a chunk; while tiles sum a group's products, vectors scale those of the one before. Rows beyond
// the block's are computed too, of whatever lies there: their results are nobody's.
template <class Format>
inline void multiply_chunk(const uint16_t* x, ptrdiff_t stride, const InputSums* sums, int sums_stride,
                           const Chunk& chunk, int groups, bool begun, float* out) {
  constexpr int kP = kPieces<Format>;
  alignas(64) BlockSums turns[2] = {};
  F results[kBlock];
  unrolled<kBlock>([&](auto r) { results[r] = begun ? f_load(out + decltype(r)::value * kStrip) : f_set(0); });
  const auto add = [&](int g, const BlockSums& found) KVBITS_INLINE {
    const InputSums* of_inputs = sums + static_cast<ptrdiff_t>(g) * sums_stride;
    for (int p = 0; p < kP; ++p) {
      unrolled<kBlock>([&](auto r) KVBITS_INLINE {
        const float sum = kP == 2 ? of_inputs[r].half[p] : of_inputs[r].half[0] + of_inputs[r].half[1];
        results[r] = f_fused(chunk.least[g][p], f_set(sum), results[r]);
        results[r] = f_fused(f_load(found[p][r]), chunk.scale[g][p], results[r]);
      });
    }
  };
  sum_on_tiles<kP, 0>(x, stride, chunk.pairs[0], turns[0]);
  for (int g = 0; g < groups; g += 2) {
    if (g + 1 < groups) sum_on_tiles<kP, 1>(x + (g + 1) * kGroup, stride, chunk.pairs[g + 1], turns[1]);
    add(g, turns[0]);
    if (g + 2 < groups) sum_on_tiles<kP, 0>(x + (g + 2) * kGroup, stride, chunk.pairs[g + 2], turns[0]);
    if (g + 1 < groups) add(g + 1, turns[1]);
  }
  unrolled<kBlock>([&](auto r) { f_store(out + decltype(r)::value * kStrip, results[r]); });
}

template <class Format>
void multiply_on_tiles(const InputRows& tile, int rows, int in, const uint8_t* strip, float* out) {
  const FlushDenormals flush;
  if (rows <= kFewRows) return multiply_few_any<Format>(tile, in, strip, out);
  static_assert(kChunkGroups % Format::kGroups == 0);
  const int groups = (in + kGroup - 1) / kGroup, last = rows % kBlock;
  Chunk chunk;
  for (int begin = 0; begin < groups; begin += kChunkGroups) {
    const int count = groups - begin < kChunkGroups ? groups - begin : kChunkGroups;
    const int there = in - begin * kGroup;  // inputs
    for (int lane = 0; lane < kStrip; lane += kWidth) {
      each_group<Format>(strip, count, [&](int g, const uint8_t* header, const uint8_t* group) {
        constexpr int kShare = Format::kGroupBytes / kStripVectors;
        const uint8_t* ahead = group + lane / kWidth * kShare + kAheadBytes;
        for (int at = 0; at < kShare; at += 64) __builtin_prefetch(ahead + at);
        unpack_group<Format>(header, group, lane, g, chunk);
      });
      for (int r = 0; r < rows; r += kBlock) {
        const bool reshaped = rows - r < kBlock && rows > kBlock;
        if (reshaped) configure_block<kPieces<Format>>(last);
        const uint16_t* x = tile.x + r * tile.stride + begin * kGroup;
        const InputSums* sums = sums_of(tile) + static_cast<ptrdiff_t>(begin) * rows + r;
        ptrdiff_t stride = 2 * tile.stride;
        alignas(64) uint16_t padded[kBlock][kChunkGroups * kGroup];
        if (there < count * kGroup) {  // zeros after the last inputs
          __builtin_memset(padded, 0, sizeof padded);
          for (int i = 0; i < kBlock && r + i < rows; ++i) __builtin_memcpy(padded[i], x + i * tile.stride, 2 * there);
          x = padded[0], stride = sizeof padded[0];
        }
        multiply_chunk<Format>(x, stride, sums, rows, chunk, count, begin > 0, out + r * kStrip + lane);
        if (reshaped) configure_block<kPieces<Format>>(kBlock);
      }
    }
    strip += kChunkGroups / Format::kGroups * Format::kBlockBytes;
  }
}

template <class... F>
const ProductKernel* find_on_tiles(int format, FormatList<F...>) {
  static const ProductKernel kernels[] = {
      {kTileRows, true, multiply_on_tiles<F>, begin_blocks<kPieces<F>>, tile_release}...};
  const int ids[] = {F::kId...};
  for (size_t i = 0; i < sizeof...(F); ++i) {
    if (ids[i] == format) return &kernels[i];
  }
  return nullptr;
}

const ProductKernel* tiles_of(int format) { return find_on_tiles(format, Formats{}); }

const ProductKernels kTileProducts = {kTileIsa, kTileRows, sizeof(InputSums), sum_groups, tiles_of};
