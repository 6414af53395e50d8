// The decoder layers around the attention, for the structure that most decoders share: norm, projections, rotary
// embedding, attention, projection, norm, gated MLP. One call runs them all, so that a decode step costs what its bytes
// cost. The residual stream is float32, products take bfloat16 and add in float32.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "../kernels.h"
#include "../weights/linear.h"

namespace kvbits {

struct DecoderLayer {
  const Linear *query, *key, *value, *output, *gate, *up, *down;
  std::vector<float> input_norm, mlp_norm, query_norm, key_norm;  // the last two may be empty
};

struct DecoderShape {
  int hidden, heads, kv_heads, dim, rotated, intermediate;
  float eps;
  Activation activation;
};

class Decoder {
 public:
  Decoder(const DecoderShape& shape, std::vector<DecoderLayer> layers, std::vector<float> final_norm,
          const Linear& head);

  int num_layers() const { return static_cast<int>(layers_.size()); }
  // `embedded` bfloat16 [rows, hidden]; `cos`, `sin` float [rows, rotated]; `layers` the caches, one a layer; logits of
  // the rows in `wanted` go to `logits` [count, vocabulary]. Any number of threads at once, each with its own `cpu`.
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
    Scratch residual, projected, heads;
    Input normed, attended, gated;
  };
  class Lease;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Room>> rooms_;
};

}  // namespace kvbits
