// Every codec by its number (Codec.native_id in Python): the one line that a new codec adds here.
// Included inside a per-ISA anonymous namespace.

struct CodecKernels {
  int id;
  KeyKernel key;
  ValueKernel value;
  SealKernel seal_key, seal_value;
  KeyKernel draft_key;  // for a step that may read less of a page (Codec.decode with `draft`)
  ValueKernel draft_value;
  OpenKernel open_key = nullptr, open_value = nullptr;
  LatentKernel latent = nullptr;  // for pages of keys
};

template <class K, class V, class DK = K, class DV = V>
constexpr CodecKernels entry(int id, SealKernel seal_key, SealKernel seal_value, OpenKernel open_key = nullptr,
                             OpenKernel open_value = nullptr, LatentKernel latent = nullptr) {
  return {id,
          {K::prepare, score_any<K>},
          {accumulate_any<V>, nullptr},
          seal_key,
          seal_value,
          {DK::prepare, score_any<DK>},
          {accumulate_any<DV>, nullptr},
          open_key,
          open_value,
          latent};
}

template <int BITS, bool PER_CHANNEL, bool SYMMETRIC>
constexpr CodecKernels affine() {
  using Format = PlainFormat<BITS, PER_CHANNEL, SYMMETRIC>;
  return entry<AffineKey<Format>, AffineValue<Format>>(Format::kId, seal_affine_key<Format>, seal_affine_value<Format>,
                                                       open_affine<Format, true>, open_affine<Format, false>,
                                                       latent_affine<Format>);
}

// 8 bits: asymmetric codes do not fit the signed operand that values are, symmetric ones are values only.
constexpr CodecKernels affine8_key() {
  using Format = PlainFormat<8, true, false>;
  using K = AffineKey<Format>;
  return {Format::kId, {K::prepare, score_any<K>}, {}, seal_affine_key<Format>,
          nullptr,     {K::prepare, score_any<K>}, {}, open_affine<Format, true>,
          nullptr,     latent_affine<Format>};
}
constexpr CodecKernels affine8_value() {
  using Format = PlainFormat<8, false, true>;
  using V = AffineValue<Format>;
  return {Format::kId,
          {},
          {accumulate_any<V>, nullptr},
          nullptr,
          seal_affine_value<Format>,
          {},
          {accumulate_any<V>, nullptr},
          nullptr,
          open_affine<Format, false>};
}

template <bool PER_CHANNEL, bool SYMMETRIC>
constexpr CodecKernels nibbles() {
  using Key = NibbleFormat<PER_CHANNEL, SYMMETRIC, true>;
  using Value = NibbleFormat<PER_CHANNEL, SYMMETRIC, false>;
  using Draft = DraftFormat<PER_CHANNEL, SYMMETRIC>;
  LatentKernel latent = nullptr;
  if constexpr (PER_CHANNEL && !SYMMETRIC) latent = latent_nibbles<Key>;
  return entry<AffineKey<Key>, AffineValue<Value>, AffineKey<Draft>, AffineValue<Draft>>(
      Key::kId, seal_affine_key<Key>, seal_affine_value<Value>, nullptr, nullptr, latent);
}

// Keys take the centers out, values do not: each has one side only.
template <int BITS>
constexpr CodecKernels codebook_key() {
  using Format = CodebookFormat<BITS, true>;
  return {Format::kId, {AffineKey<Format>::prepare, score_any<AffineKey<Format>>},
          {},          seal_affine_key<Format>,
          nullptr,     {AffineKey<Format>::prepare, score_any<AffineKey<Format>>},
          {},          nullptr,
          nullptr,     latent_codebook<BITS>};
}
template <int BITS>
constexpr CodecKernels codebook_value() {
  using Format = CodebookFormat<BITS, false>;
  using V = AffineValue<Format>;
  return {Format::kId,
          {},
          {accumulate_any<V>, unrotate_accumulator},
          nullptr,
          seal_affine_value<Format>,
          {},
          {accumulate_any<V>, unrotate_accumulator}};
}

template <int BITS, int BLOCK>
constexpr CodecKernels block_value() {
  using V = BlockValue<BITS, BLOCK>;
  return {V::kId, {}, {accumulate_any<V>, nullptr}, nullptr, V::seal, {}, {accumulate_any<V>, nullptr}};
}

template <int HIGH, int LOW>
constexpr CodecKernels mixed_key() {
  using K = MixedKey<HIGH, LOW>;
  return {K::kId, {K::prepare, score_any<K>}, {}, K::seal, nullptr, {K::prepare, score_any<K>}, {}};
}

template <int MANTISSA>
constexpr CodecKernels float8() {
  return entry<Float8Key<MANTISSA>, Float8Value<MANTISSA>>(Float8Key<MANTISSA>::kId, seal_float8<MANTISSA, true>,
                                                           seal_float8<MANTISSA, false>, nullptr, nullptr,
                                                           latent_float8<MANTISSA>);
}

const CodecKernels kCodecs[] = {
    entry<RawKey, RawValue>(RawKey::kId, RawKey::seal, RawValue::seal, nullptr, nullptr, latent_raw),
    affine8_key(),
    affine8_value(),
    affine<6, false, false>(),
    affine<6, true, false>(),
    affine<5, false, false>(),
    affine<5, true, false>(),
    affine<4, false, false>(),
    affine<4, true, false>(),
    affine<3, false, false>(),
    affine<3, true, false>(),
    affine<2, false, false>(),
    affine<2, true, false>(),
    block_value<4, 64>(),
    block_value<4, 32>(),
    block_value<3, 32>(),
    block_value<2, 32>(),
    mixed_key<8, 4>(),
    mixed_key<8, 2>(),
    mixed_key<4, 2>(),
    float8<3>(),
    float8<2>(),
    codebook_key<4>(),
    codebook_value<4>(),
    codebook_key<3>(),
    codebook_value<3>(),
    codebook_key<2>(),
    codebook_value<2>(),
    nibbles<true, false>(),
    nibbles<false, true>(),
};

const CodecKernels* find_codec(int id) {
  for (const CodecKernels& codec : kCodecs)
    if (codec.id == id) return &codec;
  return nullptr;
}

bool codec_sides(int index, CodecSides* out) {
  if (index >= static_cast<int>(sizeof(kCodecs) / sizeof(kCodecs[0]))) return false;
  const CodecKernels& codec = kCodecs[index];
  *out = {codec.id, codec.key.score && codec.seal_key, codec.value.accumulate && codec.seal_value};
  return true;
}

const KeyKernel* key_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec && codec->key.score ? &codec->key : nullptr;
}
const ValueKernel* value_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec && codec->value.accumulate ? &codec->value : nullptr;
}
SealKernel seal_key_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? codec->seal_key : nullptr;
}
SealKernel seal_value_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? codec->seal_value : nullptr;
}
OpenKernel open_key_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? codec->open_key : nullptr;
}
OpenKernel open_value_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? codec->open_value : nullptr;
}
LatentKernel latent_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? codec->latent : nullptr;
}
const KeyKernel* draft_key_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? &codec->draft_key : nullptr;
}
const ValueKernel* draft_value_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? &codec->draft_value : nullptr;
}
