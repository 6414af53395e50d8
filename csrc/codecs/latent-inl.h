// The values of multi-head latent attention are its keys' first channels: a page of keys, decoded into a 16-bit page of
// values (src/kvbits/codecs/raw.py) once for all query heads. Included inside a per-ISA anonymous namespace. Plain
// loops that compilers make vectors of.

// Channels at a time: a cache line of a page of values.
constexpr int kTile = 16;

// Numbers [kTile][kPage] become [kPage / 2][kTile][2]: pairs of tokens, `channels` from one pair to the next.
inline void store_tile(const uint16_t* numbers, int channels, uint8_t* values) {
  constexpr int kPairs = kTile * kPage / 2, kHalf = kPairs / 2;
  alignas(64) uint32_t pairs[kPairs], turned[kPairs];
  __builtin_memcpy(pairs, numbers, sizeof(pairs));
  // A pair's place has four bits of the channel before five of the pair. Each turn brings the first of all bits to the
  // end.
  const auto turn = [](const uint32_t* in, uint32_t* out) {
    for (int i = 0; i < kHalf; ++i) {
      out[2 * i] = in[i];
      out[2 * i + 1] = in[i + kHalf];
    }
  };
  turn(pairs, turned);
  turn(turned, pairs);
  turn(pairs, turned);
  turn(turned, pairs);
  for (int p = 0; p < kPage / 2; ++p) {
    __builtin_memcpy(values + static_cast<size_t>(p) * channels * 4, pairs + p * kTile, 4 * kTile);
  }
}

// number(c, t): token t of channel c as bfloat16.
template <class Number>
void store_latents(int channels, uint8_t* values, const Number& number) {
  alignas(64) uint16_t numbers[kTile * kPage];
  for (int c = 0; c < channels; c += kTile) {
    for (int i = 0; i < kTile; ++i) {
      for (int t = 0; t < kPage; ++t) numbers[i * kPage + t] = number(c + i, t);
    }
    store_tile(numbers, channels, values + static_cast<size_t>(c) * 4);
  }
}

inline void latent_raw(const uint8_t* keys, int, int value_dim, uint8_t* values) {
  const auto* in = reinterpret_cast<const uint32_t*>(keys);  // [dim / 2][kPage], two channels each
  store_latents(value_dim, values,
                [&](int c, int t) { return static_cast<uint16_t>(in[c / 2 * kPage + t] >> (c % 2 * 16)); });
}

// Code of channel c at token t of keys whose codes have BITS bits (packing.py), out of a word with four channels'
// bytes.
template <int BITS>
inline int code_at(const uint8_t* keys, int dim, int c, int t) {
  constexpr int kPlane = plane_width(BITS), kPerByte = 8 / kPlane, kMask = (1 << kPlane) - 1;
  const auto* words = reinterpret_cast<const uint32_t*>(keys) + c / (4 * kPerByte) * kPage;
  const int bits = static_cast<int>(words[t] >> (c % 4 * 8 + c / 4 % kPerByte * kPlane)) & kMask;
  if constexpr (BITS == kPlane) {
    return bits;
  } else {
    const size_t plane = static_cast<size_t>(dim) * kPage * kPlane / 8;
    return bits | code_at<BITS - kPlane>(keys + plane, dim, c, t) << kPlane;
  }
}

// Pages of PlainFormat.
template <class FORMAT>
void latent_affine(const uint8_t* keys, int dim, int value_dim, uint8_t* values) {
  const Numbers<FORMAT, true> number(keys, dim);
  store_latents(value_dim, values, [&](int c, int t) {
    const int code = code_at<FORMAT::kBits>(keys, dim, c, t);
    return bf16_from_float(number(static_cast<uint8_t>(code), FORMAT::kPerChannel ? c : t));
  });
}

// Keys of NibbleFormat: parameters by channel, with zeros.
template <class FORMAT>
void latent_nibbles(const uint8_t* keys, int dim, int value_dim, uint8_t* values) {
  const uint8_t *low = keys + FORMAT::low_at(dim), *scales = keys + FORMAT::high_bytes(dim);
  const auto* zeros = reinterpret_cast<const uint16_t*>(scales + dim);
  float scale[kMaxDim], zero[kMaxDim];
  for (int c = 0; c < value_dim; ++c) {
    scale[c] = half_to_float(static_cast<uint16_t>(scales[c] << 7));
    zero[c] = half_to_float(zeros[c]);
  }
  store_latents(value_dim, values, [&](int c, int t) {
    const int code = code_at<4>(keys, dim, c, t) << 4 | code_at<4>(low, dim, c, t);
    return bf16_from_float(code * scale[c] + zero[c]);
  });
}

template <int MANTISSA>
void latent_float8(const uint8_t* keys, int dim, int value_dim, uint8_t* values) {
  const float scale = float8_scale(keys, 0, dim);
  store_latents(value_dim, values, [&](int c, int t) {
    const uint32_t code = code_at<8>(keys, dim, c, t);
    const uint32_t bits = (code & 0x80) << 24 | (code & 0x7F) << (20 + 3 - MANTISSA);
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return bf16_from_float(x * kFloat8Lift * kFloat8Rest<MANTISSA> * scale);
  });
}

template <int BITS>
void latent_codebook(const uint8_t* keys, int dim, int value_dim, uint8_t* values) {
  uint8_t codes[kPage * kMaxDim];
  float rows[kPage * kMaxDim], scale[kPage], center[kMaxDim];
  load_codes<BITS>(keys, dim, kPage, codes);
  const uint8_t* scales = CodebookFormat<BITS, true>::params(keys, dim).scales;
  const auto* centers = reinterpret_cast<const uint16_t*>(scales + kPage);
  for (int t = 0; t < kPage; ++t) scale[t] = half_to_float(static_cast<uint16_t>(scales[t] << 7));
  for (int c = 0; c < value_dim; ++c) center[c] = half_to_float(centers[c]);
  for (int i = 0; i < dim * kPage; ++i) rows[i] = kEntries<BITS>[codes[i]] * scale[i % kPage];
  rotate(rows, dim, kPage, kPage);
  store_latents(value_dim, values, [&](int c, int t) { return bf16_from_float(rows[c * kPage + t] + center[c]); });
}
