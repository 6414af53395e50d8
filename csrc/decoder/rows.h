// What the decoder's driver and its per-ISA kernels agree on.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kvbits {

constexpr int kPanel = 16;    // output columns that lie together in a packed weight
constexpr int kRowTile = 12;  // rows that a product treats at once
constexpr int kTwoPanels = 2 * kPanel;

enum class Activation : int32_t { kSilu, kGeluTanh };

// Every result of a row is the same sequence of operations whatever the rows beside it.
struct RowKernels {
  const char* isa;
  // out[r * kTwoPanels + c]: `rows` <= kRowTile rows of bfloat16 x, `stride` elements apart, times two packed panels of
  // `pairs` pairs of inputs (see Linear).
  void (*multiply)(const uint16_t* x, ptrdiff_t stride, int rows, int pairs, const uint16_t* a, const uint16_t* b,
                   float* out);
  // The same with codes of 8 bits, `quads` times four inputs; x's are those of `quantize`.
  void (*multiply_codes)(const uint8_t* x, ptrdiff_t stride, int rows, int quads, const int8_t* a, const int8_t* b,
                         int32_t* out);
  // x as codes around `code_zero`; returns the value of one step.
  float (*quantize)(const uint16_t* x, int count, uint8_t* codes);
  int code_zero;
  // x / sqrt(mean(x^2) + eps) * weight
  void (*norm)(const float* x, const float* weight, float eps, int dim, uint16_t* out);
  // One head: the norm, where `weight` is not null, then the rotation of its first 2 * half elements.
  void (*rotate)(const float* x, const float* weight, float eps, int dim, const float* cos, const float* sin, int half,
                 uint16_t* out);
  // activation(gate) * up
  void (*gate)(const float* gate, const float* up, int count, Activation activation, uint16_t* out);
  // x as bfloat16
  void (*round)(const float* x, int count, uint16_t* out);
};

const RowKernels& scalar_rows();
const RowKernels& avx2_rows();
const RowKernels& avx512_rows();
const RowKernels& avx512bf16_rows();

// The best for the instruction set `isa` of the attention kernels on this processor.
const RowKernels& rows_for(const char* isa);

}  // namespace kvbits
