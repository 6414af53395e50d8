// What the kernels of affine-inl.h are told of a page of integer codes: where codes and parameters lie and what they
// mean. Included inside a per-ISA anonymous namespace.
//
// A format has
//   kId                  Codec.native_id in Python
//   kTerms, kRadix       byte terms of the small operand (query, weights) and the bits of each
//   kPerChannel, kZeros  one parameter per channel, else per token; whether there is a zero point at all
//   kKeyMean, kKeyOffset mean of the key's unsigned codes u, and what is taken from them: k = s (u - offset) + z
//   kValueMean           mean of the value's signed codes c: v = s c + z
//   KeyCodes, ValueCodes loaders of the codes as bytes: unsigned, signed
//   kRotated, kCentered  the page holds rotated heads (the query is rotated once, the accumulator turned back once); a
//                        key channel's center was taken out before
//   params(page, dim)    scale(i) and zero(i, scale), a vector of parameters from the i-th on; prefetch(ahead)

// One term's rounding is below 4-bit codes' own, not below finer ones'.
template <int BITS>
constexpr int kTermsFor = BITS > 4 ? 2 : 1;

// What codes of BITS bits mean in units of their scale, and the nearest of them: themselves.
template <int BITS, bool SYMMETRIC>
struct IntegerCodes {
  static constexpr bool kRotated = false, kCentered = false;
  static constexpr int kBits = BITS;
  static constexpr bool kSymmetric = SYMMETRIC;
  static constexpr int kLargestCode = SYMMETRIC ? (1 << (BITS - 1)) - 1 : (1 << BITS) - 1;
  static float nearest(float x) {
    const float code = __builtin_rintf(x);
    constexpr float kLeast = SYMMETRIC ? -kLargestCode : 0, kMost = kLargestCode;
    return !(code > kLeast) ? kLeast : code > kMost ? kMost : code;  // NaN, where feedback overflows, is the least
  }
  static float meaning(float code) { return code; }
};

// Codes of BITS bits and float16 parameters (src/kvbits/codecs/affine.py).
template <int BITS, bool PER_CHANNEL, bool SYMMETRIC>
struct PlainFormat : IntegerCodes<BITS, SYMMETRIC> {
  static constexpr int kId = BITS + 16 * PER_CHANNEL + 32 * SYMMETRIC;
  static constexpr int kTerms = kTermsFor<BITS>;
  static constexpr int kRadix = BITS > 6 ? kRadixBits8 : 8;
  static constexpr bool kPerChannel = PER_CHANNEL;
  static constexpr bool kZeros = !SYMMETRIC;
  static constexpr float kKeyMean =
      SYMMETRIC ? static_cast<float>(1 << (BITS - 1)) : static_cast<float>((1 << BITS) - 1) / 2;
  static constexpr float kKeyOffset = SYMMETRIC ? kKeyMean : 0.0f;
  static constexpr float kValueMean = SYMMETRIC ? 0.0f : kKeyMean;
  using KeyCodes = Planes<BITS>;
  using ValueCodes = std::conditional_t < BITS<8 || SYMMETRIC, Planes<BITS>, void>;  // they must fit a signed byte

  struct Params {
    const uint16_t *scales, *zeros;
    int bytes;
    F scale(int i) const { return f_load_half(scales + i); }
    F zero(int i, F) const { return f_load_half(zeros + i); }
    void prefetch(ptrdiff_t ahead) const { prefetch_all(scales, ahead, bytes); }
  };
  static Params params(const uint8_t* page, int dim) {
    const int n = PER_CHANNEL ? dim : kPage;
    const auto* scales = reinterpret_cast<const uint16_t*>(page + static_cast<size_t>(kPage) * dim * BITS / 8);
    return {scales, scales + n, n * (SYMMETRIC ? 2 : 4)};
  }

  // Sealing.
  // What is added to a symmetric code before it is stored.
  static constexpr int kKeyBias = 1 << (BITS - 1), kValueBias = 0;
  static float stored_scale(float x) { return half_to_float(saturated_half(x)); }
  static uint8_t* write(const uint8_t* codes, int reduction, int lanes, const float* scale, const float* zero, int n,
                        uint8_t* out) {
    out = store_codes<BITS>(codes, reduction, lanes, out);
    out = store_halves(scale, n, out);
    return SYMMETRIC ? out : store_halves(zero, n, out);
  }
};

// 8-bit codes as two planes of nibbles (src/kvbits/codecs/nibbles.py): the high plane, scales as bytes, zeros as
// float16 unless symmetric, padding to the cache line, the low plane. Codes are unsigned; a symmetric one is biased by
// 128.
template <bool PER_CHANNEL, bool SYMMETRIC>
struct NibbleLayout : IntegerCodes<8, SYMMETRIC> {
  static constexpr int kId = 64 + 16 * PER_CHANNEL + 32 * SYMMETRIC;
  static constexpr bool kPerChannel = PER_CHANNEL;
  static constexpr bool kZeros = true;  // not all are stored: some follow from the scale
  static constexpr float kBias = 128;   // of symmetric codes

  static size_t high_bytes(int dim) { return static_cast<size_t>(kPage) * dim / 2; }
  static int params_of(int dim) { return PER_CHANNEL ? dim : kPage; }
  static int param_bytes(int n) { return n * (SYMMETRIC ? 1 : 3); }
  static size_t low_at(int dim) { return (high_bytes(dim) + param_bytes(params_of(dim)) + 63) / 64 * 64; }

  // What is read is FACTOR * scale and zero + SHIFT * scale, so that code * scale + zero is the element.
  template <int FACTOR, class SHIFT>
  struct Params {
    const uint8_t* scales;
    int n;
    F scale(int i) const {
      const F s = f_load_scale8(scales + i);
      return FACTOR == 1 ? s : f_mul(s, f_set(FACTOR));
    }
    // `scaled`: what scale(i) gave
    F zero(int i, F scaled) const {
      const F shift = f_mul(scaled, f_set(SHIFT::value / FACTOR));
      if constexpr (SYMMETRIC) return shift;
      return f_add(f_load_half(reinterpret_cast<const uint16_t*>(scales + n) + i), shift);
    }
    void prefetch(ptrdiff_t ahead) const { prefetch_all(scales, ahead, param_bytes(n)); }
  };
};

// Both planes. KEY: the codes are the unsigned operand.
template <bool PER_CHANNEL, bool SYMMETRIC, bool KEY>
struct NibbleFormat : NibbleLayout<PER_CHANNEL, SYMMETRIC> {
  using Layout = NibbleLayout<PER_CHANNEL, SYMMETRIC>;
  static constexpr int kTerms = 2;
  static constexpr int kRadix = kRadixBits8;
  static constexpr float kKeyMean = 127.5f, kKeyOffset = 0.0f, kValueMean = 0.0f;
  using KeyCodes = NibblePlanes<Layout, 0>;
  using ValueCodes = NibblePlanes<Layout, 0x80>;  // u - 128

  struct Shift {
    static constexpr float value = (SYMMETRIC ? -Layout::kBias : 0.0f) + (KEY ? 0.0f : 128.0f);
  };
  using Params = typename Layout::template Params<1, Shift>;
  static Params params(const uint8_t* page, int dim) {
    return {page + Layout::high_bytes(dim), Layout::params_of(dim)};
  }

  // Sealing.
  static constexpr int kKeyBias = 128, kValueBias = 128;
  static float stored_scale(float x) { return half_to_float(static_cast<uint16_t>(scale8_from_float(x, true) << 7)); }
  static uint8_t* write(const uint8_t* codes, int reduction, int lanes, const float* scale, const float* zero, int n,
                        uint8_t* out) {
    uint8_t* p = store_plane<4, 4>(codes, reduction, lanes, out);
    for (int i = 0; i < n; ++i) *p++ = static_cast<uint8_t>(half_from_float(scale[i]) >> 7);
    if (!SYMMETRIC) p = store_halves(zero, n, p);
    while ((p - out) % 64 != 0) *p++ = 0;
    return store_plane<4, 0>(codes, reduction, lanes, p);
  }
};

// The high plane alone: u is about 16 h + 7.5.
template <bool PER_CHANNEL, bool SYMMETRIC>
struct DraftFormat : NibbleLayout<PER_CHANNEL, SYMMETRIC> {
  using Layout = NibbleLayout<PER_CHANNEL, SYMMETRIC>;
  static constexpr int kTerms = 1;
  static constexpr int kRadix = 8;
  static constexpr float kKeyMean = 7.5f, kKeyOffset = 0.0f, kValueMean = 7.5f;
  using KeyCodes = Planes<4>;
  using ValueCodes = Planes<4>;

  struct Shift {
    static constexpr float value = 7.5f - (SYMMETRIC ? Layout::kBias : 0.0f);
  };
  using Params = typename Layout::template Params<16, Shift>;
  static Params params(const uint8_t* page, int dim) {
    return {page + Layout::high_bytes(dim), Layout::params_of(dim)};
  }
};
