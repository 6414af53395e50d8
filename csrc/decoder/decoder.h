// The decoder layers around the attention, for the structure that most decoders share: norm, projections, rotary
// embedding, attention, projection, norm, gated MLP. One call runs them all, so that a decode step costs what its bytes
// cost. The residual stream is float32, products take bfloat16 and add in float32.
#pragma once
#include <memory>
#include <vector>

#include "../kernels.h"
#include "../step.h"
#include "rows.h"

namespace kvbits {

// A packed weight [out, in]: panels of kPanel outputs; in a panel, for each pair of inputs, the outputs' two bfloat16.
// What is beyond the weight is zero, the last panel's partner included.
class Linear {
 public:
  // `weight` bfloat16 [out, in], contiguous; `bias` float [out] or null.
  Linear(const uint16_t* weight, const float* bias, int out, int in);

  int in() const { return in_; }
  int out() const { return out_; }
  int pairs() const { return (in_ + 1) / 2; }
  int panel_pairs() const { return (out_ + kTwoPanels - 1) / kTwoPanels; }
  const uint16_t* panel(int index) const { return data_.get() + static_cast<size_t>(index) * pairs() * kTwoPanels; }
  const float* bias() const { return bias_.empty() ? nullptr : bias_.data(); }

 private:
  struct Free {
    void operator()(uint16_t* p) const;
  };
  int out_, in_;
  std::unique_ptr<uint16_t, Free> data_;
  std::vector<float> bias_;
};

// y = x W^T + b; x bfloat16 [rows, in] with rows `stride` elements apart, y bfloat16 [rows, out], contiguous.
void apply_linear(Cpu& cpu, const Linear& linear, const uint16_t* x, ptrdiff_t stride, int rows, uint16_t* y);

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
          const Linear& head)
      : shape_(shape), layers_(std::move(layers)), final_norm_(std::move(final_norm)), head_(head) {}

  int num_layers() const { return static_cast<int>(layers_.size()); }
  // `embedded` bfloat16 [rows, hidden]; `cos`, `sin` float [rows, rotated]; `layers` the caches, one a layer; logits of
  // the rows in `wanted` go to `logits` [count, vocabulary].
  void forward(Cpu& cpu, const std::vector<const Layer*>& layers, const Batch& batch, int rows,
               const uint16_t* embedded, const float* cos, const float* sin, const int64_t* wanted, int count,
               float* logits);

 private:
  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  std::vector<float> final_norm_;
  const Linear& head_;
  Scratch residual_, normed_, projected_, heads_, attended_, gated_;
};

}  // namespace kvbits
