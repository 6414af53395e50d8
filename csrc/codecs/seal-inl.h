// Encoding pages of integer codes (formats-inl.h). Included inside a per-ISA anonymous namespace.
//
// Once per page: plain loops over a matrix [reduction][lanes] that the compiler vectorizes. Every operation
// is the one of the torch reference, in float32 and in its order, so the bytes agree.
//
// Numbers that are none count as 0 and make the scale of their group NaN: whoever reads the page must notice.

// Before a rotation: sums of so many must not overflow. No scale reaches as far.
constexpr float kRotatedMost = 0x1p96f;

// The middle of a key channel's range over the page, taken out of it.
inline uint16_t take_center(float* x) {
  float low = x[0], high = x[0];
  for (int t = 0; t < kPage; ++t) {
    low = x[t] < low ? x[t] : low;
    high = x[t] > high ? x[t] : high;
  }
  const uint16_t center = saturated_half((low + high) * 0.5f);
  for (int t = 0; t < kPage; ++t) x[t] -= half_to_float(center);
  return center;
}

template <class FORMAT>
struct AffineSeal {
  static constexpr bool kSymmetric = FORMAT::kSymmetric;
  static constexpr int kTop = (1 << FORMAT::kBits) - 1;

  // kKey: keys, else values. kPerRow: one parameter per reduced element, else one per lane.
  template <bool kKey, bool kPerRow>
  static void seal(const uint8_t* open_page, int reduction, int lanes, const Rounding& rounding, uint8_t* out) {
    thread_local float matrix[kPage * kMaxDim];
    thread_local uint8_t codes[kPage * kMaxDim];
    const auto* pairs = reinterpret_cast<const uint16_t*>(open_page);
    for (int pair = 0; pair < reduction / 2; ++pair) {
      for (int lane = 0; lane < lanes; ++lane) {
        matrix[(2 * pair) * lanes + lane] = bf16_to_float(pairs[2 * (pair * lanes + lane)]);
        matrix[(2 * pair + 1) * lanes + lane] = bf16_to_float(pairs[2 * (pair * lanes + lane) + 1]);
      }
    }
    bool broken[kMaxDim] = {};
    const bool any_broken = any_not_finite(pairs, reduction * lanes);
    if (any_broken) {
      for (int i = 0; i < reduction * lanes; ++i) {
        if (is_finite(matrix[i])) continue;
        broken[kPerRow ? i / lanes : i % lanes] = true;
        matrix[i] = 0;
      }
    }
    uint16_t center[FORMAT::kCentered ? kMaxDim : 1];
    if constexpr (FORMAT::kCentered) {
      static_assert(kKey || !FORMAT::kCentered);
      for (int row = 0; row < reduction; ++row) center[row] = take_center(matrix + row * lanes);
    }
    if constexpr (FORMAT::kRotated) {
      for (int i = 0; i < reduction * lanes; ++i) {
        const float x = matrix[i];
        matrix[i] = x > kRotatedMost ? kRotatedMost : x < -kRotatedMost ? -kRotatedMost : x;
      }
      if constexpr (kKey) {
        rotate(matrix, reduction, lanes, lanes);
      } else {
        for (int row = 0; row < reduction; ++row) rotate(matrix + row * lanes, lanes, 1, 1);
      }
    }
    const int n = kPerRow ? reduction : lanes;
    float low[kMaxDim], high[kMaxDim], scale[kMaxDim], inverse[kMaxDim];
    for (int i = 0; i < n; ++i) low[i] = high[i] = kPerRow ? matrix[i * lanes] : matrix[i];
    for (int row = 0; row < reduction; ++row) {
      const float* x = matrix + row * lanes;
      if constexpr (kPerRow) {
        float least = x[0], largest = x[0];
        for (int lane = 0; lane < lanes; ++lane) {
          least = x[lane] < least ? x[lane] : least;
          largest = x[lane] > largest ? x[lane] : largest;
        }
        low[row] = least;
        high[row] = largest;
      } else {
        for (int lane = 0; lane < lanes; ++lane) {
          low[lane] = x[lane] < low[lane] ? x[lane] : low[lane];
          high[lane] = x[lane] > high[lane] ? x[lane] : high[lane];
        }
      }
    }
    for (int i = 0; i < n; ++i) {
      if constexpr (kSymmetric) {
        const float largest = high[i] > -low[i] ? high[i] : -low[i];
        scale[i] = FORMAT::stored_scale((FORMAT::kRotated ? largest * rounding.clip : largest) / FORMAT::kLargestCode);
        low[i] = 0;
      } else {
        if (rounding.clip != 1.0f) {
          const float middle = (low[i] + high[i]) * 0.5f, reach = (high[i] - low[i]) * 0.5f * rounding.clip;
          low[i] = middle - reach;
          high[i] = middle + reach;
        }
        low[i] = half_to_float(saturated_half(low[i]));
        const float range = high[i] > low[i] ? high[i] - low[i] : 0.0f;  // a saturated least may be the larger
        scale[i] = FORMAT::stored_scale(range / FORMAT::kLargestCode);
      }
      inverse[i] = scale[i] > 0 ? 1.0f / scale[i] : 0.0f;
    }
    const auto nearest = [&](float x, int i) { return FORMAT::nearest((x - low[i]) * inverse[i]); };
    constexpr int kBias = kKey ? FORMAT::kKeyBias : FORMAT::kValueBias;
    const auto stored = [&](float code) {
      if constexpr (kSymmetric) return static_cast<uint8_t>((static_cast<int>(code) + kBias) & kTop);
      return static_cast<uint8_t>(code);
    };
    if (rounding.feedback == nullptr) {
      for (int row = 0; row < reduction; ++row) {
        for (int lane = 0; lane < lanes; ++lane) {
          codes[row * lanes + lane] = stored(nearest(matrix[row * lanes + lane], kPerRow ? row : lane));
        }
      }
    } else if constexpr (kKey) {
      // Channels are rows: what a row's rounding loses is taken from the rows still to come, lane by lane.
      float error[kPage];
      for (int step = 0; step < reduction; ++step) {
        const int row = rounding.order ? rounding.order[step] : step;
        for (int lane = 0; lane < kPage; ++lane) {
          const int i = kPerRow ? row : lane;
          const float x = matrix[row * kPage + lane], code = nearest(x, i);
          codes[row * kPage + lane] = stored(code);
          error[lane] = x - (FORMAT::meaning(code) * scale[i] + low[i]);
        }
        const float* factors = rounding.feedback + static_cast<size_t>(step) * reduction;
        for (int later = step + 1; later < reduction; ++later) {
          float* y = matrix + (rounding.order ? rounding.order[later] : later) * kPage;
          for (int lane = 0; lane < kPage; ++lane) y[lane] -= error[lane] * factors[later];
        }
      }
    } else {
      // Channels are lanes: the same along each token's row.
      for (int row = 0; row < reduction; ++row) {
        float* x = matrix + row * lanes;
        for (int step = 0; step < lanes; ++step) {
          const int lane = rounding.order ? rounding.order[step] : step;
          const int i = kPerRow ? row : lane;
          const float code = nearest(x[lane], i);
          codes[row * lanes + lane] = stored(code);
          const float error = x[lane] - (FORMAT::meaning(code) * scale[i] + low[i]);
          const float* factors = rounding.feedback + static_cast<size_t>(step) * lanes;
          for (int later = step + 1; later < lanes; ++later) {
            x[rounding.order ? rounding.order[later] : later] -= error * factors[later];
          }
        }
      }
    }
    if (any_broken) {
      for (int i = 0; i < n; ++i) scale[i] = broken[i] ? __builtin_nanf("") : scale[i];
    }
    uint8_t* end = FORMAT::write(codes, reduction, lanes, scale, low, n, out);
    if constexpr (FORMAT::kCentered) {
      __builtin_memcpy(end, center, static_cast<size_t>(reduction) * 2);
      end += 2 * reduction;
    }
    // Pad to the cache line with zeros: page bytes are hashed, sent and compared.
    while ((end - out) % 64 != 0) *end++ = 0;
  }
};

template <class FORMAT>
void seal_affine_key(const uint8_t* open_page, int dim, const Rounding& rounding, uint8_t* out) {
  AffineSeal<FORMAT>::template seal<true, FORMAT::kPerChannel>(open_page, dim, kPage, rounding, out);
}
template <class FORMAT>
void seal_affine_value(const uint8_t* open_page, int dim, const Rounding& rounding, uint8_t* out) {
  AffineSeal<FORMAT>::template seal<false, !FORMAT::kPerChannel>(open_page, kPage, dim, rounding, out);
}
