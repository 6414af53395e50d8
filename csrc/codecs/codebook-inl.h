// Codebook pages of rotated heads (src/kvbits/codecs/codebook.py): formats for the kernels of affine-inl.h, whose codes
// are looked up while they are loaded. Included inside a per-ISA anonymous namespace.

// Entries in units of the scale; 0 after the last.
template <int BITS>
constexpr int8_t kEntries[16] = {};
template <>
constexpr int8_t kEntries<4>[16] = {-60, -47, -37, -28, -21, -15, -9, -3, 3, 9, 15, 21, 28, 37, 47, 60};
template <>
constexpr int8_t kEntries<3>[16] = {-52, -32, -18, -6, 6, 18, 32, 52};
template <>
constexpr int8_t kEntries<2>[16] = {-37, -11, 11, 37};
template <int BITS>
constexpr int kReach = BITS == 4   ? 55
                       : BITS == 3 ? 52
                                   : 46;  // a token's largest element in units of its scale
constexpr int kEntryOffset = 64;          // what makes an entry unsigned

struct EntryTable {
  alignas(16) uint8_t bytes[16];
};
template <int BITS>
constexpr EntryTable entry_table(int offset) {
  EntryTable table{};
  for (int i = 0; i < 16; ++i) table.bytes[i] = static_cast<uint8_t>(kEntries<BITS>[i] + offset);
  return table;
}

// Entries plus OFFSET instead of codes.
template <int BITS, int OFFSET>
struct EntryPlanes {
  static constexpr int kQuads = Planes<BITS>::kQuads;
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int reduction, int lanes, int group, int lane,
                          B* out) {
    static constexpr EntryTable table = entry_table<BITS>(OFFSET);
    Planes<BITS>::load(codes, ahead, reduction, lanes, group, lane, out);
    for (int i = 0; i < kQuads; ++i) out[i] = b_lookup(table.bytes, out[i]);
  }
};

template <int BITS, bool CENTERED>
struct CodebookFormat {
  static constexpr int kId = 256 + BITS + 16 * CENTERED;
  // Entries have seven bits, so that two products fit AVX2's 16 bits; one term's rounding is below the codes' own.
  static constexpr int kTerms = 1;
  static constexpr int kRadix = 8;
  static constexpr bool kPerChannel = false, kZeros = false, kRotated = true, kCentered = CENTERED;
  static constexpr float kKeyMean = kEntryOffset, kKeyOffset = kEntryOffset, kValueMean = 0.0f;
  using KeyCodes = EntryPlanes<BITS, kEntryOffset>;
  using ValueCodes = EntryPlanes<BITS, 0>;

  struct Params {
    const uint8_t* scales;
    int bytes;
    F scale(int i) const { return f_load_scale8(scales + i); }
    F zero(int, F) const { return f_set(0); }
    F center(int i) const { return f_load_half(reinterpret_cast<const uint16_t*>(scales + kPage) + i); }
    void prefetch(ptrdiff_t ahead) const { prefetch_all(scales, ahead, bytes); }
  };
  static Params params(const uint8_t* page, int dim) {
    return {page + static_cast<size_t>(kPage) * dim * BITS / 8, kPage + (CENTERED ? 2 * dim : 0)};
  }

  // Sealing.
  static constexpr int kBits = BITS;
  static constexpr bool kSymmetric = true;
  static constexpr int kLargestCode = kReach<BITS>;
  static constexpr int kKeyBias = 0, kValueBias = 0;
  static float stored_scale(float x) { return half_to_float(static_cast<uint16_t>(scale8_from_float(x, false) << 7)); }
  static float nearest(float x) {
    int code = 0;
    // No number at all counts as the largest, as it does for torch.bucketize.
    for (int i = 1; i < 1 << BITS; ++i) code += !(x <= (kEntries<BITS>[i] + kEntries<BITS>[i - 1]) * 0.5f);
    return static_cast<float>(code);
  }
  static float meaning(float code) { return kEntries<BITS>[static_cast<int>(code)]; }
  static uint8_t* write(const uint8_t* codes, int reduction, int lanes, const float* scale, const float*, int n,
                        uint8_t* out) {
    out = store_codes<BITS>(codes, reduction, lanes, out);
    for (int i = 0; i < n; ++i) *out++ = static_cast<uint8_t>(half_from_float(scale[i]) >> 7);
    return out;
  }
};

// Rotates blocks of channels `stride` apart, `width` neighbours at once, as src/kvbits/codecs/hadamard.py does.
inline void rotate(float* x, int dim, int stride, int width) {
  const int block = dim & -dim;
  for (int step = 1; step < block; step *= 2) {
    for (int first = 0; first < dim; first += 2 * step) {
      for (int i = first; i < first + step; ++i) {
        float *a = x + static_cast<ptrdiff_t>(i) * stride, *b = a + static_cast<ptrdiff_t>(step) * stride;
        for (int k = 0; k < width; ++k) {
          const float sum = a[k] + b[k], difference = a[k] - b[k];
          a[k] = sum;
          b[k] = difference;
        }
      }
    }
  }
  const float scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(block)));
  for (int i = 0; i < dim; ++i)
    for (int k = 0; k < width; ++k) x[static_cast<ptrdiff_t>(i) * stride + k] *= scale;
}

// The rotation is its own inverse.
inline void unrotate_accumulator(QueryRow& row, int dim) { rotate(row.accumulator, dim, 1, 1); }
