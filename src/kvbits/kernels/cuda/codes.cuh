// Codes of a page as the 16-bit operands of the tensor cores: eight reduced elements (channels of keys, tokens of values)
// of one lane at a time, an *octet*, in four words of two, in an order that differs by format.
#pragma once
#include <warp.cuh>

enum { RAW = 16, INT8 = 8, INT4 = 4, INT2 = 2, NF4 = 104 };

// how many loads of four lanes an octet takes; a load of INT2 serves two octets
INLINE constexpr int rows_of(int kind) { return kind == RAW ? 4 : kind == INT8 ? 2 : 1; }
INLINE constexpr int octets_of(int kind) { return kind == INT2 ? 2 : 1; }
INLINE constexpr int bits_of(int kind) { return kind == NF4 ? 4 : kind; }

// Octet `o` of the lanes `t` begins at element octet_base + octet_lane: octets that share a load lie side by side.
template <int KIND>
INLINE constexpr int octet_base(int o) { return KIND == INT2 ? 64 * (o >> 1) + 8 * (o & 1) : 32 * o; }
template <int KIND>
INLINE constexpr int octet_lane(int t) { return KIND == INT2 ? 16 * t : 8 * t; }
template <int KIND>
INLINE int octet_start(int o, int t) { return octet_base<KIND>(o) + octet_lane<KIND>(t); }

// (0,4) (1,5) (2,6) (3,7), as a transposed matrix comes, in the order of KIND's codes
template <int KIND>
INLINE void arrange_split(const u32 (&x)[4], u32 (&y)[4]) {
  if (KIND == INT4 || KIND == INT2) {  // (0,2) (4,6) (1,3) (5,7)
    y[0] = permute(x[0], x[2], 0x5410), y[1] = permute(x[0], x[2], 0x7632);
    y[2] = permute(x[1], x[3], 0x5410), y[3] = permute(x[1], x[3], 0x7632);
  } else if (KIND == NF4) {  // (0,1) (4,5) (2,3) (6,7)
    y[0] = permute(x[0], x[1], 0x5410), y[1] = permute(x[0], x[1], 0x7632);
    y[2] = permute(x[2], x[3], 0x5410), y[3] = permute(x[2], x[3], 0x7632);
  } else {  // (0,1) (2,3) (4,5) (6,7)
    y[0] = permute(x[0], x[1], 0x5410), y[1] = permute(x[2], x[3], 0x5410);
    y[2] = permute(x[0], x[1], 0x7632), y[3] = permute(x[2], x[3], 0x7632);
  }
}

// the same from (0,1) (2,3) (4,5) (6,7)
template <int KIND>
INLINE void arrange(const u32 (&x)[4], u32 (&y)[4]) {
  if (KIND == INT4 || KIND == INT2) {
    y[0] = permute(x[0], x[1], 0x5410), y[1] = permute(x[2], x[3], 0x5410);
    y[2] = permute(x[0], x[1], 0x7632), y[3] = permute(x[2], x[3], 0x7632);
  } else if (KIND == NF4) {
    y[0] = x[0], y[1] = x[2], y[2] = x[1], y[3] = x[3];
  } else {
    y[0] = x[0], y[1] = x[1], y[2] = x[2], y[3] = x[3];
  }
}

// A float16 of 1024 and more has the integers 1024 to 2047 in its ten bits: a code is put there and 1024 taken away.
INLINE u32 with_magic(u32 x, u32 mask) { return and_or(x, mask, 0x64006400); }
INLINE u32 less(u32 x, u32 offset) { return add_f16(x, offset); }

// eight entries of the codebook, ±3 ±9 ±15 ±21 ±28 ±37 ±47 ±60 plus 64, by two permutes: a selector with its high bit set
// gives the sign of the byte, which is 0
INLINE u32 entries(u32 codes, u32 other) {
  return permute(0x241b1104, 0x3d37312b, codes) | permute(0x554f4943, 0x7c6f655c, other);
}

// `w`: the octet's words (rows_of), `part`: which octet of an INT2 word; `c`: exact float16 (RAW: bfloat16)
template <int KIND, bool KEY>
INLINE void unpack(const u32 (&w)[rows_of(KIND)], int part, u32 (&c)[4]) {
  if constexpr (KIND == RAW) {
    c[0] = w[0], c[1] = w[1], c[2] = w[2], c[3] = w[3];
  } else if constexpr (KIND == INT8) {
    UNROLL for (int i = 0; i < 2; i++) {
      u32 x = KEY ? w[i] : w[i] ^ 0x80808080;  // values are in two's complement
      u32 offset = KEY ? 0xe400e400 : 0xe480e480;
      c[2 * i] = less(permute(x, 0x64646464, 0x4140), offset);
      c[2 * i + 1] = less(permute(x, 0x64646464, 0x4342), offset);
    }
  } else if constexpr (KIND == INT4) {
    u32 x = w[0], y = x >> 8;
    c[0] = less(with_magic(x, 0x000f000f), 0xe400e400);
    c[1] = fma_f16(with_magic(x, 0x00f000f0), 0x2c002c00, 0xd400d400);  // (1024 + 16 c) / 16 - 64
    c[2] = less(with_magic(y, 0x000f000f), 0xe400e400);
    c[3] = fma_f16(with_magic(y, 0x00f000f0), 0x2c002c00, 0xd400d400);
  } else if constexpr (KIND == INT2) {
    u32 x = w[0], y = x >> 8;
    if (part == 0) {
      c[0] = less(with_magic(x, 0x00030003), 0xe400e400);
      c[1] = fma_f16(with_magic(x, 0x000c000c), 0x34003400, 0xdc00dc00);  // / 4 - 256
      c[2] = less(with_magic(y, 0x00030003), 0xe400e400);
      c[3] = fma_f16(with_magic(y, 0x000c000c), 0x34003400, 0xdc00dc00);
    } else {
      c[0] = fma_f16(with_magic(x, 0x00300030), 0x2c002c00, 0xd400d400);
      c[1] = fma_f16(with_magic(x, 0x00c000c0), 0x24002400, 0xcc00cc00);  // / 64 - 16
      c[2] = fma_f16(with_magic(y, 0x00300030), 0x2c002c00, 0xd400d400);
      c[3] = fma_f16(with_magic(y, 0x00c000c0), 0x24002400, 0xcc00cc00);
    }
  } else {
    static_assert(KIND == NF4, "a format without codes");
    u32 other = w[0] ^ 0x88888888;
    u32 x = entries(w[0], other), y = entries(w[0] >> 16, other >> 16);  // 0 4 1 5 and 2 6 3 7
    c[0] = less(permute(x, 0x64646464, 0x4240), 0xe440e440);
    c[1] = less(permute(x, 0x64646464, 0x4341), 0xe440e440);
    c[2] = less(permute(y, 0x64646464, 0x4240), 0xe440e440);
    c[3] = less(permute(y, 0x64646464, 0x4341), 0xe440e440);
  }
}
