// Scales and minima of a group as vectors of outputs.

// Of the outputs from `lane` on; PART: which half of the group.
template <class Format, int PART>
inline F load_scale(const uint8_t* header, const uint8_t* group, int lane) {
  const uint8_t* scales = group + Format::kCodeBytes;
  const auto half = [lane](const uint8_t* p) { return f_load_half(reinterpret_cast<const uint16_t*>(p) + lane); };
  if constexpr (Format::kParams == Params::kSuperScaleMin) return f_mul(half(header), f_load_u8(scales + lane));
  if constexpr (Format::kParams == Params::kSuperHalves) {
    return f_mul(half(header), f_load_s8(scales + PART * kStrip + lane));
  }
  return half(scales);
}

template <class Format>
inline F load_min(const uint8_t* header, const uint8_t* group, int lane) {
  const uint8_t* mins = group + Format::kCodeBytes + Format::kScaleBytes / 2;
  if constexpr (Format::kParams == Params::kSuperScaleMin) {
    const F unit = f_load_half(reinterpret_cast<const uint16_t*>(header) + kStrip + lane);
    return f_sub(f_set(0), f_mul(unit, f_load_u8(mins + lane)));
  }
  const F stored = f_load_half(reinterpret_cast<const uint16_t*>(mins) + lane);
  if constexpr (Format::kParams == Params::kScaleZero) {
    return f_sub(f_set(0), f_mul(load_scale<Format, 0>(header, group, lane), stored));
  }
  return stored;
}

// What the sums of products of codes begin at.
template <class Format, int PART>
inline I first_sum(const InputGroup& x) {
  constexpr int kTaken = Format::kBits == 8 && kDotCentred ? 128 : 0;  // by the products themselves
  if constexpr (Format::kOffset == kTaken) return i_zero();
  const I minus = i_sll<Format::kBits - 1>(i_set(x.minus[PART]));
  return kTaken > 0 ? i_sub(i_zero(), minus) : minus;
}
