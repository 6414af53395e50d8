// Every codec by its number (Codec.native_id in Python): the one line that a new codec adds here.
// Included inside a per-ISA anonymous namespace.

template <class K>
void score_any(const uint8_t* page, ptrdiff_t ahead, int dim, const QueryRow* rows, int count, float* scores) {
  static_assert(kBlockRows == 4);
  switch (count) {
    case 1:
      return K::template score_rows<1>(page, ahead, dim, rows, scores);
    case 2:
      return K::template score_rows<2>(page, ahead, dim, rows, scores);
    case 3:
      return K::template score_rows<3>(page, ahead, dim, rows, scores);
    default:
      return K::template score_rows<4>(page, ahead, dim, rows, scores);
  }
}

template <class V>
void accumulate_any(const uint8_t* page, ptrdiff_t ahead, int dim, QueryRow* rows, int count, const float* weights,
                    const float* keep) {
  switch (count) {
    case 1:
      return V::template accumulate_rows<1>(page, ahead, dim, rows, weights, keep);
    case 2:
      return V::template accumulate_rows<2>(page, ahead, dim, rows, weights, keep);
    case 3:
      return V::template accumulate_rows<3>(page, ahead, dim, rows, weights, keep);
    default:
      return V::template accumulate_rows<4>(page, ahead, dim, rows, weights, keep);
  }
}

struct CodecKernels {
  int id;
  KeyKernel key;
  ValueKernel value;
  SealKernel seal_key, seal_value;
};

template <class K, class V>
constexpr CodecKernels entry(int id, SealKernel seal_key, SealKernel seal_value) {
  return {id, {K::prepare, score_any<K>}, {accumulate_any<V>}, seal_key, seal_value};
}

template <int BITS, bool PER_CHANNEL, bool SYMMETRIC>
constexpr CodecKernels affine() {
  return entry<AffineKey<BITS, PER_CHANNEL, SYMMETRIC>, AffineValue<BITS, PER_CHANNEL, SYMMETRIC>>(
      BITS + 16 * PER_CHANNEL + 32 * SYMMETRIC, seal_affine_key<BITS, PER_CHANNEL, SYMMETRIC>,
      seal_affine_value<BITS, PER_CHANNEL, SYMMETRIC>);
}

const CodecKernels kCodecs[] = {
    entry<RawKey, RawValue>(0, RawKey::seal, RawValue::seal),
    affine<8, false, true>(),
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
};

const CodecKernels* find_codec(int id) {
  for (const CodecKernels& codec : kCodecs)
    if (codec.id == id) return &codec;
  return nullptr;
}

const KeyKernel* key_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? &codec->key : nullptr;
}
const ValueKernel* value_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? &codec->value : nullptr;
}
SealKernel seal_key_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? codec->seal_key : nullptr;
}
SealKernel seal_value_kernel(int id) {
  const CodecKernels* codec = find_codec(id);
  return codec ? codec->seal_value : nullptr;
}
