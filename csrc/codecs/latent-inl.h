// The values of multi-head latent attention are its keys' first channels: a page of keys, decoded into a 16-bit page of
// values (src/kvbits/codecs/raw.py) once for all query heads. Included inside a per-ISA anonymous namespace.

constexpr int kPairs = kPage / 2;  // of tokens

// Pairs of tokens channel by channel, [channels][kPairs], become a page: pair by pair, [kPairs][channels].
inline void store_pairs(const uint32_t* pairs, int channels, uint8_t* values) {
  auto* out = reinterpret_cast<uint32_t*>(values);
  constexpr int kTile = 16;  // a cache line of the page
  for (int c = 0; c < channels; c += kTile) {
    for (int p = 0; p < kPairs; ++p) {
      for (int i = 0; i < kTile; ++i) out[static_cast<size_t>(p) * channels + c + i] = pairs[(c + i) * kPairs + p];
    }
  }
}

inline void latent_raw(const uint8_t* keys, int, int value_dim, uint8_t* values) {
  thread_local uint32_t pairs[kMaxDim * kPairs];
  const auto* in = reinterpret_cast<const uint32_t*>(keys);  // [dim / 2][kPage], two channels each
  for (int c = 0; c < value_dim; c += 2) {
    const uint32_t* both = in + static_cast<size_t>(c) * kPairs;
    uint32_t *even = pairs + c * kPairs, *odd = even + kPairs;
    for (int p = 0; p < kPairs; ++p) {
      const uint32_t first = both[2 * p], second = both[2 * p + 1];
      even[p] = (first & 0xFFFF) | (second << 16);
      odd[p] = (first >> 16) | (second & 0xFFFF0000);
    }
  }
  store_pairs(pairs, value_dim, values);
}

// number(c, t): token t of channel c.
template <class Number>
void store_numbers(int channels, uint8_t* values, const Number& number) {
  thread_local uint32_t pairs[kMaxDim * kPairs];
  uint32_t rounded[kPage];
  for (int c = 0; c < channels; ++c) {
    for (int t = 0; t < kPage; ++t) rounded[t] = bf16_from_float(number(c, t));
    for (int p = 0; p < kPairs; ++p) pairs[c * kPairs + p] = rounded[2 * p] | rounded[2 * p + 1] << 16;
  }
  store_pairs(pairs, channels, values);
}

// Pages of PlainFormat.
template <class FORMAT>
void latent_affine(const uint8_t* keys, int dim, int value_dim, uint8_t* values) {
  thread_local uint8_t codes[kPage * kMaxDim];
  load_codes<FORMAT::kBits>(keys, dim, kPage, codes);
  const Numbers<FORMAT, true> number(keys, dim);
  store_numbers(value_dim, values,
                [&](int c, int t) { return number(codes[c * kPage + t], FORMAT::kPerChannel ? c : t); });
}

// Keys of NibbleFormat: parameters by channel, with zeros.
template <class FORMAT>
void latent_nibbles(const uint8_t* keys, int dim, int value_dim, uint8_t* values) {
  thread_local uint8_t codes[kPage * kMaxDim];
  load_plane<4, 0>(keys + FORMAT::low_at(dim), dim, kPage, codes);
  load_plane<4, 4>(keys, dim, kPage, codes);
  const uint8_t* scales = keys + FORMAT::high_bytes(dim);
  const auto* zeros = reinterpret_cast<const uint16_t*>(scales + dim);
  store_numbers(value_dim, values, [&](int c, int t) {
    return codes[c * kPage + t] * half_to_float(static_cast<uint16_t>(scales[c] << 7)) + half_to_float(zeros[c]);
  });
}

template <int MANTISSA>
void latent_float8(const uint8_t* keys, int dim, int value_dim, uint8_t* values) {
  thread_local uint8_t codes[kPage * kMaxDim];
  load_codes<8>(keys, dim, kPage, codes);
  const float scale = float8_scale(keys, 0, dim);
  store_numbers(value_dim, values, [&](int c, int t) {
    const uint32_t code = codes[c * kPage + t], bits = (code & 0x80) << 24 | (code & 0x7F) << (20 + 3 - MANTISSA);
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return x * kFloat8Lift * kFloat8Rest<MANTISSA> * scale;
  });
}

template <int BITS>
void latent_codebook(const uint8_t* keys, int dim, int value_dim, uint8_t* values) {
  thread_local uint8_t codes[kPage * kMaxDim];
  thread_local float rows[kPage * kMaxDim];
  load_codes<BITS>(keys, dim, kPage, codes);
  const uint8_t* scales = CodebookFormat<BITS, true>::params(keys, dim).scales;
  const auto* centers = reinterpret_cast<const uint16_t*>(scales + kPage);
  float scale[kPage];
  for (int t = 0; t < kPage; ++t) scale[t] = half_to_float(static_cast<uint16_t>(scales[t] << 7));
  for (int i = 0; i < dim * kPage; ++i) rows[i] = kEntries<BITS>[codes[i]] * scale[i % kPage];
  rotate(rows, dim, kPage, kPage);
  store_numbers(value_dim, values, [&](int c, int t) { return rows[c * kPage + t] + half_to_float(centers[c]); });
}
