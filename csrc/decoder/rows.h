// What the decoder's driver and its per-ISA kernels agree on.
#pragma once
#include "../weights/formats.h"

namespace kvbits {

enum class Activation : int32_t { kSilu, kGeluTanh, kClamped };

// What joins the two halves of a gated MLP: activation(gate) * up or, clamped, with gate at most `limit` and up within
// it, gate * sigmoid(alpha * gate) * (up + 1).
struct Gate {
  Activation activation;
  float alpha, limit;
};

// Every result of a row is the same sequence of operations whatever the rows beside it.
struct RowKernels {
  const char* isa;
  // Of bfloat16 weights; sums are float32.
  ProductKernel product;
  // x / sqrt(mean(x^2) + eps) * weight
  void (*norm)(const float* x, const float* weight, float eps, int dim, uint16_t* out);
  // One head: the norm, where `weight` is not null, then the rotation of its first 2 * half elements.
  void (*rotate)(const float* x, const float* weight, float eps, int dim, const float* cos, const float* sin, int half,
                 uint16_t* out);
  void (*gate)(const float* gate, const float* up, int count, const Gate& how, uint16_t* out);
  // x as bfloat16
  void (*round)(const float* x, int count, uint16_t* out);
  // The norm, in place and not rounded.
  void (*normalize)(float* x, const float* weight, float eps, int dim);
  // cap * tanh(x / cap), in place
  void (*soft_cap)(float* x, float cap, int count);
};

const RowKernels& scalar_rows();
const RowKernels& avx2_rows();
const RowKernels& avx512_rows();
const RowKernels& avx512bf16_rows();
const RowKernels& amx_rows();
const RowKernels& amx_emulated_rows();

// The best for the instruction set `isa` of the attention kernels on this processor.
const RowKernels& rows_for(const char* isa);

}  // namespace kvbits
