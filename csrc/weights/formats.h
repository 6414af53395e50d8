// How weights lie in memory, format by format. Plain data; no inline code.
//
// A weight [out, in] is cut into strips of kStrip outputs. The formats in bits are ggml's, and some of ours: a strip is
// a sequence of blocks (of one group of kGroup inputs, or of eight that share a header), in which what belongs to the
// strip's outputs lies side by side, ready for vectors of outputs:
//
//   header (blocks of eight only): the outputs' float16 scales, then the scales of their minima where there are any
//   for each group: codes, then scales (see Params)
//   codes: quads of inputs (4 bytes an output), two by two: the first in the low nibbles, the second in the high ones;
//          then a plane with the fifth bits (bit q of a byte: quad q), or two with the fifth and sixth (bits 2q and
//          2q + 1 of a byte: quad q of the half); 8-bit codes one by one
#pragma once
#include <cstddef>
#include <cstdint>

namespace kvbits {

constexpr int kStrip = 32;
constexpr int kGroup = 32;
constexpr int kBf16 = 30;  // ggml's number

enum class Params {
  kScale,          // w = scale * (code - offset)
  kScaleMin,       // w = scale * code + min
  kScaleZero,      // w = scale * (code - zero)
  kSuperScaleMin,  // eight groups: w = (d * scale) * code - dmin * min, scale and min of 8 bits
  kSuperHalves,    // eight groups: w = (d * scale) * (code - offset), a signed scale of 8 bits for each half of a group
};

// ID is ggml's number of the type; our own begin at 1000.
template <int ID, int BITS, Params PARAMS>
struct Format {
  static constexpr int kId = ID;
  static constexpr int kBits = BITS;
  static constexpr Params kParams = PARAMS;
  static constexpr bool kSuper = PARAMS == Params::kSuperScaleMin || PARAMS == Params::kSuperHalves;
  static constexpr bool kTwoHalves = PARAMS == Params::kScaleMin || PARAMS == Params::kScaleZero;
  static constexpr bool kHasMin = kTwoHalves || PARAMS == Params::kSuperScaleMin;
  static constexpr int kOffset = kHasMin ? 0 : 1 << (BITS - 1);
  static constexpr int kGroups = kSuper ? 8 : 1;
  static constexpr int kCodeBytes = kStrip * kGroup * BITS / 8;
  static constexpr int kScaleBytes = kTwoHalves ? 4 * kStrip : 2 * kStrip;
  static constexpr int kGroupBytes = kCodeBytes + kScaleBytes;
  static constexpr int kHeaderBytes = !kSuper ? 0 : kHasMin ? 4 * kStrip : 2 * kStrip;
  static constexpr int kBlockBytes = kHeaderBytes + kGroups * kGroupBytes;
};

template <class... F>
struct FormatList {};

// Every format in bits: the one line that a new one adds here.
using Formats = FormatList<Format<8, 8, Params::kScale>,           // Q8_0
                           Format<2, 4, Params::kScale>,           // Q4_0
                           Format<3, 4, Params::kScaleMin>,        // Q4_1
                           Format<6, 5, Params::kScale>,           // Q5_0
                           Format<7, 5, Params::kScaleMin>,        // Q5_1
                           Format<12, 4, Params::kSuperScaleMin>,  // Q4_K
                           Format<13, 5, Params::kSuperScaleMin>,  // Q5_K
                           Format<14, 6, Params::kSuperHalves>,    // Q6_K
                           Format<1008, 8, Params::kScaleMin>,     // int8
                           Format<1009, 4, Params::kScaleZero>,    // uint4
                           Format<1010, 8, Params::kScaleZero>>;   // uint8

// A group of one row's inputs, in two halves with a scale each: x = scale * code.
struct alignas(64) InputGroup {
  int8_t codes[kGroup];
  float scale[2];
  float sum;         // of the rounded inputs
  int32_t minus[2];  // the halves' sums of codes, negative: what offsets of the weights' codes take
  int32_t unused[3];
};
static_assert(sizeof(InputGroup) == 64, "a cache line");

// A tile of rows of inputs: as they are and, for grouped products, what ProductKernels::prepare made of them.
struct InputRows {
  const uint16_t* x;  // bfloat16, rows `stride` elements apart
  ptrdiff_t stride;
  const InputGroup* groups;  // group g of row r of `rows`: groups[g * rows + r]; tiles' are others
  int rows;
};

// One format's product. Every result of a row is the same sequence of operations whatever the rows beside it.
struct ProductKernel {
  int row_tile;  // rows that it treats at once, at most
  bool grouped;  // reads InputRows::groups
  // out[r * kStrip + c]: `rows` <= row_tile rows times one strip.
  void (*multiply)(const InputRows& x, int rows, int in, const uint8_t* strip, float* out);
  // Around a thread's products with `rows` rows: tiles take their shapes, and are given back. Null: nothing to do.
  void (*begin)(int rows) = nullptr;
  void (*end)() = nullptr;
};
constexpr int kMostTileRows = 64;

// The products of one instruction set. For the formats in bits their results are the same bits for all of them but
// those on tiles.
struct ProductKernels {
  const char* isa;
  int row_tile;        // of all grouped ones
  size_t group_bytes;  // of what products want to know of a row's group of inputs: for most an InputGroup
  // That of x, a group at a time: out[0], out[stride], ... ; `in` inputs, zeros after them.
  void (*prepare)(const uint16_t* x, int in, ptrdiff_t stride, void* out);
  const ProductKernel* (*product)(int format);  // null: no such format
};

const ProductKernels& scalar_products();
const ProductKernels& avx2_products();
const ProductKernels& avx512_products();
const ProductKernels& amx_products();
const ProductKernels& amx_emulated_products();

// The best for the instruction set `isa` of the attention kernels on this processor.
const ProductKernels& products_for(const char* isa);

}  // namespace kvbits
