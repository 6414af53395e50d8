// The decoder layers around the attention, for the structure that most decoders share: norm, projections, rotary
// embedding, attention, projection, norm, gated MLP. One call runs them all, so that a decode step costs what its bytes
// cost. The residual stream is float32, products take bfloat16 and add in float32.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "../kernels.h"
#include "../step.h"
#include "rows.h"

namespace kvbits {

// A packed weight [out, in]: panels of kPanel outputs; in a panel, for each pair of inputs, the outputs' two bfloat16.
// What is beyond the weight is zero, the last panel's partner included. Or codes of 8 bits with a scale for each
// output, in quads of inputs instead of pairs; the inputs are then quantized too, row by row.
class Linear {
 public:
  // `weight` bfloat16 [out, in], contiguous; `bias` float [out] or null.
  Linear(const uint16_t* weight, const float* bias, int out, int in);
  // `codes` [out, in], `scales` [out].
  Linear(const int8_t* codes, const float* scales, const float* bias, int out, int in, int code_zero);

  int in() const { return in_; }
  int out() const { return out_; }
  // Pairs or quads of inputs.
  int steps() const { return coded() ? (in_ + 3) / 4 : (in_ + 1) / 2; }
  int panel_pairs() const { return (out_ + kTwoPanels - 1) / kTwoPanels; }
  bool coded() const { return !scales_.empty(); }
  const uint16_t* panel(int index) const { return at<uint16_t>(index); }
  const int8_t* codes(int index) const { return at<int8_t>(index); }
  // What the inputs' zero adds to the sums of the outputs from `column` on.
  const int32_t* offsets(int column) const { return offsets_.data() + column; }
  // Products of the outputs from `column` on become results: scale, bias.
  void finish(int column, int count, float* products) const;

 private:
  struct Free {
    void operator()(void* p) const;
  };
  template <class T>
  const T* at(int index) const {
    return static_cast<const T*>(data_.get()) + static_cast<size_t>(index) * steps() * kPanel * (4 / sizeof(T));
  }
  template <class T>
  void pack(const T* weight);

  int out_, in_;
  std::unique_ptr<void, Free> data_;
  std::vector<float> scales_, bias_;
  std::vector<int32_t> offsets_;
};

// Rows of bfloat16, and their codes where a coded weight will meet them.
class Input {
 public:
  // Room for `rows` rows of `width`; the elements are written by the caller.
  uint16_t* get(int rows, int width);
  void borrow(const uint16_t* x, ptrdiff_t stride, int width);
  // Room for the codes of `rows` rows, and, once a row is written, its codes.
  void reserve_codes(int rows);
  void quantize(const RowKernels& kernels, int row);

  const uint16_t* row(int r) const { return x_ + r * stride_; }
  ptrdiff_t stride() const { return stride_; }
  const uint8_t* codes(int r) const { return codes_ + static_cast<ptrdiff_t>(r) * code_stride_; }
  ptrdiff_t code_stride() const { return code_stride_; }
  float step(int r) const { return steps_[r]; }

 private:
  Scratch memory_, code_memory_, step_memory_;
  const uint16_t* x_ = nullptr;
  uint8_t* codes_ = nullptr;
  float* steps_ = nullptr;
  ptrdiff_t stride_ = 0, code_stride_ = 0;
  int width_ = 0;
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
  // the rows in `wanted` go to `logits` [count, vocabulary]. Any number of threads at once, each with its own `cpu`.
  void forward(Cpu& cpu, const std::vector<const Layer*>& layers, const Batch& batch, int rows,
               const uint16_t* embedded, const float* cos, const float* sin, const int64_t* wanted, int count,
               float* logits);

 private:
  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  std::vector<float> final_norm_;
  const Linear& head_;

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
