// The codecs whose pages meet many rows on tiles; those of others are met by the vectors' kernels, a few rows at a
// time. Included inside a per-ISA anonymous namespace.

// Where tiles begin to pay for integer codes: with heads of 64 and 128 prompts took 0.98 and 1.02 (int8), 1.15 and 1.03
// (int4) times as long as with vectors (Emerald Rapids).
constexpr int kCodesFrom = 192;

struct TileCodec {
  int id;
  void (*score)(const Block&, int);
  void (*accumulate)(const Block&, int);
  bool few = false;     // few rows too: their results are not the vectors'
  bool drafts = false;  // a draft reads the page otherwise, with the vectors' kernels
};

template <int BITS, bool PER_CHANNEL>
constexpr TileCodec affine() {
  using Format = PlainFormat<BITS, PER_CHANNEL, false>;
  return {Format::kId, score_codes_many<AffineKey<Format>>, accumulate_codes_many<AffineValue<Format>>};
}
template <class Format>
constexpr TileCodec key_of(bool drafts = false) {
  return {Format::kId, score_codes_many<AffineKey<Format>>, nullptr, false, drafts};
}
template <class Format>
constexpr TileCodec value_of(bool drafts = false) {
  return {Format::kId, nullptr, accumulate_codes_many<AffineValue<Format>>, false, drafts};
}
template <class K>
constexpr TileCodec mixed() {
  return {K::kId, score_mixed_many<K>, nullptr};
}
template <class V>
constexpr TileCodec blocks() {
  return {V::kId, nullptr, accumulate_blocks_many<V>};
}
template <class P>
constexpr TileCodec floats() {
  return {P::Key::kId, score_floats<P>, accumulate_floats<P>, true};
}

const TileCodec kTileCodecs[] = {
    floats<RawTiles>(),
    key_of<PlainFormat<8, true, false>>(),
    value_of<PlainFormat<8, false, true>>(),
    affine<6, false>(),
    affine<6, true>(),
    affine<5, false>(),
    affine<5, true>(),
    affine<4, false>(),
    affine<4, true>(),
    affine<3, false>(),
    affine<3, true>(),
    affine<2, false>(),
    affine<2, true>(),
    blocks<BlockValue<4, 64>>(),
    blocks<BlockValue<4, 32>>(),
    blocks<BlockValue<3, 32>>(),
    blocks<BlockValue<2, 32>>(),
    mixed<MixedKey<8, 4>>(),
    mixed<MixedKey<8, 2>>(),
    mixed<MixedKey<4, 2>>(),
    floats<Float8Tiles<3>>(),
    floats<Float8Tiles<2>>(),
    key_of<CodebookFormat<4, true>>(),
    value_of<CodebookFormat<4, false>>(),
    key_of<CodebookFormat<3, true>>(),
    value_of<CodebookFormat<3, false>>(),
    key_of<CodebookFormat<2, true>>(),
    value_of<CodebookFormat<2, false>>(),
    key_of<NibbleFormat<true, false, true>>(true),
    value_of<NibbleFormat<false, true, false>>(true),
};
constexpr int kTileCodecCount = sizeof(kTileCodecs) / sizeof(kTileCodecs[0]);

// The vectors' kernels with those of tiles put in.
struct TileTable {
  KeyKernel keys[kTileCodecCount];
  ValueKernel values[kTileCodecCount];

  TileTable() {
    for (int i = 0; i < kTileCodecCount; ++i) {
      const TileCodec& tiles = kTileCodecs[i];
      if (tiles.score) {
        keys[i] = *avx512_kernels().key(tiles.id);
        keys[i].score_many = tiles.score;
        keys[i].many_from = tiles.few ? 0 : kCodesFrom;
        if (tiles.few) keys[i].score = tiles.score;
      }
      if (tiles.accumulate) {
        values[i] = *avx512_kernels().value(tiles.id);
        values[i].accumulate_many = tiles.accumulate;
        values[i].many_from = tiles.few ? 0 : kCodesFrom;
        if (tiles.few) values[i].accumulate = tiles.accumulate;
      }
    }
  }
};

const TileTable& tile_table() {
  static const TileTable table;
  return table;
}

int tile_codec(int id) {
  for (int i = 0; i < kTileCodecCount; ++i)
    if (kTileCodecs[i].id == id) return i;
  return -1;
}

const KeyKernel* tile_key(int id) {
  const int i = tile_codec(id);
  return i >= 0 && kTileCodecs[i].score ? &tile_table().keys[i] : avx512_kernels().key(id);
}
const ValueKernel* tile_value(int id) {
  const int i = tile_codec(id);
  return i >= 0 && kTileCodecs[i].accumulate ? &tile_table().values[i] : avx512_kernels().value(id);
}
const KeyKernel* tile_draft_key(int id) {
  const int i = tile_codec(id);
  return i >= 0 && !kTileCodecs[i].drafts ? tile_key(id) : avx512_kernels().draft_key(id);
}
const ValueKernel* tile_draft_value(int id) {
  const int i = tile_codec(id);
  return i >= 0 && !kTileCodecs[i].drafts ? tile_value(id) : avx512_kernels().draft_value(id);
}

Kernels kernels_on_tiles() {
  Kernels kernels = avx512_kernels();
  kernels.isa = kIsa;
  kernels.key = tile_key;
  kernels.value = tile_value;
  kernels.draft_key = tile_draft_key;
  kernels.draft_value = tile_draft_value;
  kernels.kept_bytes = kKeptBytes + 2 * kUnpackedBytes;
  kernels.begin = begin_tiles;
  kernels.end = tile_release;
  return kernels;
}
