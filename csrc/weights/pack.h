// From ggml's blocks, as files hold them, to strips and back.
#pragma once
#include "formats.h"

namespace kvbits {

// How one row's weights are put into a strip. A block is what shares scales: 32 or 256 inputs, 2 of bfloat16.
struct WeightFormat {
  int id;
  int block_inputs;
  int stored_bytes;  // of a row's block as files hold it
  int strip_bytes;   // of a block of a strip
  void (*pack)(const uint8_t* stored, int row, uint8_t* strip);
  // The block's inputs of one row, with the roundings of ggml's own unpacking.
  void (*unpack)(const uint8_t* strip, int row, float* out);
};

// Null: no such format.
const WeightFormat* weight_format(int id);

}  // namespace kvbits
