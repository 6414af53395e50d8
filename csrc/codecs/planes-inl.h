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

// Loads the codes of `kQuads` consecutive quads of the reduced dimension for one vector of lanes.
template <int BITS>
struct Planes;

template <>
struct Planes<8> {
  static constexpr int kQuads = 1;
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int, int lanes, int group, int lane, B* out) {
    out[0] = b_stream(codes + (static_cast<size_t>(group) * lanes + lane) * 4, ahead);
  }
};

template <>
struct Planes<4> {
  static constexpr int kQuads = 2;
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int, int lanes, int group, int lane, B* out) {
    const B v = b_stream(codes + (static_cast<size_t>(group) * lanes + lane) * 4, ahead);
    out[0] = b_extract<0, 0x0f>(v);
    out[1] = b_extract<4, 0x0f>(v);
  }
};

template <>
struct Planes<2> {
  static constexpr int kQuads = 4;
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int, int lanes, int group, int lane, B* out) {
    const B v = b_stream(codes + (static_cast<size_t>(group) * lanes + lane) * 4, ahead);
    out[0] = b_extract<0, 3>(v);
    out[1] = b_extract<2, 3>(v);
    out[2] = b_extract<4, 3>(v);
    out[3] = b_extract<6, 3>(v);
  }
};

// A 1-bit plane: eight quads, each bit moved to position SHIFT.
template <int SHIFT>
inline void load_bit_plane(const uint8_t* plane, ptrdiff_t ahead, int lanes, int group, int lane, B* out) {
  const B v = b_stream(plane + (static_cast<size_t>(group) * lanes + lane) * 4, ahead);
  constexpr int kMask = 1 << SHIFT;
  out[0] = b_extract<0 - SHIFT, kMask>(v);
  out[1] = b_extract<1 - SHIFT, kMask>(v);
  out[2] = b_extract<2 - SHIFT, kMask>(v);
  out[3] = b_extract<3 - SHIFT, kMask>(v);
  out[4] = b_extract<4 - SHIFT, kMask>(v);
  out[5] = b_extract<5 - SHIFT, kMask>(v);
  out[6] = b_extract<6 - SHIFT, kMask>(v);
  out[7] = b_extract<7 - SHIFT, kMask>(v);
}

template <>
struct Planes<3> {
  static constexpr int kQuads = 8;
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int reduction, int lanes, int group, int lane,
                          B* out) {
    Planes<2>::load(codes, ahead, reduction, lanes, 2 * group, lane, out);
    Planes<2>::load(codes, ahead, reduction, lanes, 2 * group + 1, lane, out + 4);
    B high[8];
    load_bit_plane<2>(codes + static_cast<size_t>(reduction) * lanes / 4, ahead, lanes, group, lane, high);
    for (int i = 0; i < 8; ++i) out[i] = b_or(out[i], high[i]);
  }
};

template <>
struct Planes<5> {
  static constexpr int kQuads = 8;
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int reduction, int lanes, int group, int lane,
                          B* out) {
    for (int i = 0; i < 4; ++i) Planes<4>::load(codes, ahead, reduction, lanes, 4 * group + i, lane, out + 2 * i);
    B high[8];
    load_bit_plane<4>(codes + static_cast<size_t>(reduction) * lanes / 2, ahead, lanes, group, lane, high);
    for (int i = 0; i < 8; ++i) out[i] = b_or(out[i], high[i]);
  }
};

template <>
struct Planes<6> {
  static constexpr int kQuads = 4;
  static inline void load(const uint8_t* codes, ptrdiff_t ahead, int reduction, int lanes, int group, int lane,
                          B* out) {
    Planes<4>::load(codes, ahead, reduction, lanes, 2 * group, lane, out);
    Planes<4>::load(codes, ahead, reduction, lanes, 2 * group + 1, lane, out + 2);
    const B v = b_stream(
        codes + static_cast<size_t>(reduction) * lanes / 2 + (static_cast<size_t>(group) * lanes + lane) * 4, ahead);
    out[0] = b_or(out[0], b_extract<-4, 0x30>(v));
    out[1] = b_or(out[1], b_extract<-2, 0x30>(v));
    out[2] = b_or(out[2], b_extract<0, 0x30>(v));
    out[3] = b_or(out[3], b_extract<2, 0x30>(v));
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

template <int BITS>
inline uint8_t* store_codes(const uint8_t* codes, int reduction, int lanes, uint8_t* out) {
  if constexpr (BITS == 8) return store_plane<8, 0>(codes, reduction, lanes, out);
  if constexpr (BITS == 4 || BITS == 5 || BITS == 6) out = store_plane<4, 0>(codes, reduction, lanes, out);
  if constexpr (BITS == 2 || BITS == 3) out = store_plane<2, 0>(codes, reduction, lanes, out);
  if constexpr (BITS == 3) out = store_plane<1, 2>(codes, reduction, lanes, out);
  if constexpr (BITS == 5) out = store_plane<1, 4>(codes, reduction, lanes, out);
  if constexpr (BITS == 6) out = store_plane<2, 4>(codes, reduction, lanes, out);
  return out;
}
