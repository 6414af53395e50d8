// Decoding pages of integer codes back into rows: not for attention, which reads the codes, but for pages that leave.
// Included inside a per-ISA anonymous namespace. Plain loops, as in seal-inl.h; every operation is the torch
// reference's.

// Undoes store_plane.
template <int WIDTH, int SHIFT>
inline const uint8_t* load_plane(const uint8_t* in, int reduction, int lanes, uint8_t* codes) {
  constexpr int kPerByte = 8 / WIDTH, kMask = (1 << WIDTH) - 1;
  for (int group = 0; group < reduction / (4 * kPerByte); ++group, in += 4 * lanes) {
    for (int j = 0; j < kPerByte; ++j) {
      for (int i = 0; i < 4; ++i) {
        uint8_t* row = codes + static_cast<size_t>(4 * (kPerByte * group + j) + i) * lanes;
        for (int lane = 0; lane < lanes; ++lane) {
          const int bits = ((in[4 * lane + i] >> (WIDTH * j)) & kMask) << SHIFT;
          row[lane] = static_cast<uint8_t>(SHIFT == 0 ? bits : row[lane] | bits);
        }
      }
    }
  }
  return in;
}

template <int BITS, int SHIFT = 0>
inline void load_codes(const uint8_t* in, int reduction, int lanes, uint8_t* codes) {
  constexpr int kPlane = plane_width(BITS);
  in = load_plane<kPlane, SHIFT>(in, reduction, lanes, codes);
  if constexpr (BITS > kPlane) load_codes<BITS - kPlane, SHIFT + kPlane>(in, reduction, lanes, codes);
}

// The element that a code of parameter `i` means.
template <class FORMAT, bool KEY>
struct Numbers {
  float scale[kMaxDim], zero[kMaxDim];

  Numbers(const uint8_t* page, int dim) {
    const auto params = FORMAT::params(page, dim);
    const int n = FORMAT::kPerChannel ? dim : kPage;
    for (int i = 0; i < n; ++i) {
      scale[i] = half_to_float(params.scales[i]);
      zero[i] = FORMAT::kSymmetric ? 0 : half_to_float(params.zeros[i]);
    }
  }
  float operator()(uint8_t code, int i) const {
    if constexpr (!FORMAT::kSymmetric) return code * scale[i] + zero[i];
    // Two's complement where nothing was added.
    constexpr int kBias = KEY ? FORMAT::kKeyBias : 0, kShift = 8 - FORMAT::kBits;
    const int value = KEY ? code - kBias : static_cast<int8_t>(code << kShift) >> kShift;
    return value * scale[i];
  }
};

// Pages of PlainFormat.
template <class FORMAT, bool KEY>
void open_affine(const uint8_t* page, int dim, uint16_t* rows, int64_t row) {
  thread_local uint8_t codes[kPage * kMaxDim];
  const int reduction = KEY ? dim : kPage, lanes = KEY ? kPage : dim;
  load_codes<FORMAT::kBits>(page, reduction, lanes, codes);
  const Numbers<FORMAT, KEY> number(page, dim);
  if constexpr (KEY) {
    // Numbers channel by channel, then the transposition: each loop alone is one that a compiler makes vectors of.
    thread_local uint16_t numbers[kPage * kMaxDim];
    for (int c = 0; c < dim; ++c) {
      for (int t = 0; t < kPage; ++t) {
        numbers[c * kPage + t] = bf16_from_float(number(codes[c * kPage + t], FORMAT::kPerChannel ? c : t));
      }
    }
    for (int t = 0; t < kPage; ++t) {
      for (int c = 0; c < dim; ++c) rows[t * row + c] = numbers[c * kPage + t];
    }
  } else {
    for (int t = 0; t < kPage; ++t) {
      for (int c = 0; c < dim; ++c) {
        rows[t * row + c] = bf16_from_float(number(codes[t * dim + c], FORMAT::kPerChannel ? c : t));
      }
    }
  }
}
