// Codes of 8 to 2 bits as vectors of bytes. The byte order is defined, with its reason, in
// src/kvbits/codecs/packing.py. Included inside a per-ISA anonymous namespace, after simd/*-inl.h.

// Vectors of lanes that a kernel keeps in registers at once, with `sums` accumulators for each, when one load gives
// `quads` vectors of codes. More than `budget` accumulators make the compiler spill them.
constexpr int lane_vectors(int sums, int quads, int budget = kRegisters / 2) {
  int vectors = 1;
  while (2 * vectors * sums <= budget && 2 * vectors * quads <= 8 && vectors < 4) vectors *= 2;
  return vectors;
}

// A load that also asks for the bytes `ahead` of it: the same place in the page to come, one page's work early. Into
// the second-level cache: asking for the first (`prefetcht0`) halves the speed of everything here on Zen 4, where such
// requests fill the few buffers that ordinary loads need.
inline B b_stream(const uint8_t* p, ptrdiff_t ahead) {
  __builtin_prefetch(p + ahead, 0, 2);
  return b_load(p);
}

// The same for a codec's parameters.
inline void prefetch_all(const void* p, ptrdiff_t ahead, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const uint8_t*>(p) + ahead + i, 0, 2);
}

// Bits of the plane that holds the lowest of BITS bits: the largest power of two in them.
constexpr int plane_width(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

// Quads `QUADS` (from `group`'s first on) of the planes that hold bits SHIFT to SHIFT + BITS - 1, into those bits.
template <int BITS, int SHIFT, int QUADS>
[[gnu::always_inline]] inline void load_planes(const uint8_t* plane, ptrdiff_t ahead, int reduction, int lanes,
                                               int group, int lane, B* out) {
  constexpr int kPlane = plane_width(BITS), kShared = 8 / kPlane;  // quads that share a byte
  unrolled<QUADS / kShared>([&](auto i) KVBITS_INLINE {
    const size_t at = (static_cast<size_t>(group * (QUADS / kShared) + i) * lanes + lane) * 4;
    const B v = b_stream(plane + at, ahead);
    unrolled<kShared>([&](auto j) KVBITS_INLINE {
      const B bits = kPlane == 8 ? v : b_extract<kPlane * j - SHIFT, ((1 << kPlane) - 1) << SHIFT>(v);
      out[i * kShared + j] = SHIFT == 0 ? bits : b_or(out[i * kShared + j], bits);
    });
  });
  if constexpr (BITS > kPlane) {
    const size_t bytes = static_cast<size_t>(reduction) * lanes * kPlane / 8;
    load_planes<BITS - kPlane, SHIFT + kPlane, QUADS>(plane + bytes, ahead, reduction, lanes, group, lane, out);
  }
}

// Loads the codes of `kQuads` consecutive quads of the reduced dimension for one vector of lanes.
template <int BITS>
struct Planes {
  static constexpr int kQuads = 8 / (BITS & -BITS);  // those that share a byte of the narrowest plane
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int reduction, int lanes, int group, int lane,
                          B* out) {
    load_planes<BITS, 0, kQuads>(codes, ahead, reduction, lanes, group, lane, out);
  }
};

// Two planes of nibbles as bytes, every byte with the bits of FLIP turned over. The low plane's place is LAYOUT's.
template <class LAYOUT, int FLIP>
struct NibblePlanes {
  static constexpr int kQuads = 2;
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int reduction, int lanes, int group, int lane,
                          B* out) {
    const size_t at = (static_cast<size_t>(group) * lanes + lane) * 4;
    const B high = b_stream(codes + at, ahead);
    const B low = b_stream(codes + LAYOUT::low_at(reduction * lanes / kPage) + at, ahead);
    out[0] = b_or(b_extract<0, 0x0f>(low), b_flip<FLIP>(b_extract<-4, 0xf0>(high)));
    out[1] = b_or(b_extract<4, 0x0f>(low), b_flip<FLIP>(b_extract<0, 0xf0>(high)));
  }
};

// Writes codes [reduction][lanes] (one byte each) as planes of WIDTH bits starting at bit SHIFT; returns the end.
template <int WIDTH, int SHIFT>
inline uint8_t* store_plane(const uint8_t* codes, int reduction, int lanes, uint8_t* out) {
  constexpr int kPerByte = 8 / WIDTH;
  constexpr int kMask = (1 << WIDTH) - 1;
  for (int group = 0; group < reduction / (4 * kPerByte); ++group) {
    for (int lane = 0; lane < lanes; ++lane) {
      for (int i = 0; i < 4; ++i) {
        int byte = 0;
        for (int j = 0; j < kPerByte; ++j) {
          const int row = 4 * (kPerByte * group + j) + i;
          byte |= ((codes[static_cast<size_t>(row) * lanes + lane] >> SHIFT) & kMask) << (WIDTH * j);
        }
        *out++ = static_cast<uint8_t>(byte);
      }
    }
  }
  return out;
}

// All planes of codes whose bits from SHIFT on are still to be stored.
template <int BITS, int SHIFT = 0>
inline uint8_t* store_codes(const uint8_t* codes, int reduction, int lanes, uint8_t* out) {
  constexpr int kPlane = plane_width(BITS);
  out = store_plane<kPlane, SHIFT>(codes, reduction, lanes, out);
  if constexpr (BITS > kPlane) return store_codes<BITS - kPlane, SHIFT + kPlane>(codes, reduction, lanes, out);
  return out;
}
