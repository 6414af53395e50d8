// The decoder layers around the attention, of the parts that most decoders share: norms before or after, projections,
// rotary embedding, attention, gated MLP or a mixture of experts. One call runs them all, so that a decode step costs
// what its bytes cost. The residual stream is float32, products take bfloat16 and add in float32.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "../kernels.h"
#include "experts.h"

namespace kvbits {

// What a layer's MLP is where it is not dense.
struct Mixture {
  const Linear* router = nullptr;
  const Experts* experts = nullptr;
  int chosen = 0;
  bool among_chosen = false;  // see choose_experts
};

struct DecoderLayer {
  const Linear *query, *key, *value, *output;
  const Linear *gate, *up, *down;  // null in a mixture
  Mixture mixture;
  // Before a block (empty: its input is only rounded), and after it (empty: none).
  std::vector<float> input_norm, attention_norm, mlp_norm, output_norm;
  std::vector<float> query_norm, key_norm;  // of one head, of all heads together, or empty
  std::vector<float> sinks;                 // of each head, or empty
  int rope;                                 // which of the rotary tables
};

struct DecoderShape {
  int hidden, heads, kv_heads, dim, rotated;
  float eps, soft_cap;  // of the logits; 0: none
  Gate gate;
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, std::vector<DecoderLayer> layers, std::vector<float> final_norm,
          const Linear& head);

  int num_layers() const { return static_cast<int>(layers_.size()); }
  // `embedded` bfloat16 [rows, hidden]; `cos`, `sin` float [tables, rows, rotated]; `layers` the caches, one a layer;
  // logits of the rows in `wanted` go to `logits` [count, vocabulary]. Any number of threads at once, each with its own
  // `cpu`.
  void forward(Cpu& cpu, const std::vector<const Layer*>& layers, const Batch& batch, int rows,
               const uint16_t* embedded, const float* cos, const float* sin, const int64_t* wanted, int count,
               float* logits);

 private:
  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  std::vector<float> final_norm_;
  const Linear& head_;
  bool grouped_;  // whether a weight is in bits, so that inputs are too

  // A call's memory, kept for the next one: as many as there were ever calls at once.
  struct Room {
    Scratch residual, block, projected, heads, router, chosen, shares;
    Input normed, attended, gated;
    Experts::Room experts;
  };
  class Lease;
  class Step;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Room>> rooms_;
};

}  // namespace kvbits
