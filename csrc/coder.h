// Pages of one side of a layer from rows and back, outside any pool: for blocks that leave another engine.
#pragma once
#include "kernels.h"

namespace kvbits {

// Rows of whole pages, [pages * kPage, heads, dim] in bfloat16, strides in elements; and their sealed pages.
struct Coded {
  int codec, pages, heads, dim;
  bool key;
  uint16_t* rows;
  int64_t row, head;
  uint8_t* sealed;  // [pages, heads]
  int64_t page_bytes, head_bytes;
};

// In the caller's thread. False: the codec has no such kernel.
bool encode(const Kernels& kernels, const Coded& coded, const float* feedback, const int32_t* order, const float* clip);
bool decode(const Kernels& kernels, const Coded& coded);

}  // namespace kvbits
