// A packed weight and the rows that it is multiplied with.
#pragma once
#include <functional>
#include <vector>

#include "../decoder/rows.h"
#include "../step.h"
#include "memory.h"
#include "pack.h"

namespace kvbits {

// The kernels of one instruction set.
struct LinearKernels {
  explicit LinearKernels(const char* isa) : rows(rows_for(isa)), coded(products_for(isa)) {}
  const ProductKernel& product(int format) const { return format == kBf16 ? rows.product : *coded.product(format); }

  const RowKernels& rows;
  const ProductKernels& coded;
};

// A packed weight [out, in] (see formats.h). Rows beyond `out` are zero.
class Linear {
 public:
  // Without weights yet; `format` is one that weight_format knows, `bias` float [out] or null.
  Linear(int format, const float* bias, int out, int in);
  // Some of another one's outputs, whose memory it shares; `first` is a multiple of kStrip.
  Linear(const Linear& whole, int first, int out);

  // Fill strips `first` to `last` - 1. `stored`: rows of blocks as files hold them, `row_bytes` apart; row o of the
  // weight is the stored row order[o], or o where `order` is null. Strips may be filled by several threads.
  void fill(const uint8_t* stored, size_t row_bytes, const int64_t* order, int first, int last);
  // The weights of one output; out[blocks * block inputs], of which the first in() are meant.
  void unpack(int row, float* out) const;

  int in() const { return in_; }
  int out() const { return out_; }
  int format() const { return format_.id; }
  bool grouped() const { return format_.id != kBf16; }
  int blocks() const { return (in_ + format_.block_inputs - 1) / format_.block_inputs; }
  int block_inputs() const { return format_.block_inputs; }
  int strips() const { return (out_ + kStrip - 1) / kStrip; }
  size_t strip_bytes() const { return static_cast<size_t>(blocks()) * format_.strip_bytes; }
  size_t bytes() const { return strip_bytes() * strips(); }
  const uint8_t* strip(int index) const { return data_.get() + (first_strip_ + index) * strip_bytes(); }
  int columns(int strip) const { return out_ - strip * kStrip < kStrip ? out_ - strip * kStrip : kStrip; }
  void add_bias(int column, int count, float* products) const;

 private:
  const WeightFormat& format_;
  int out_, in_;
  size_t first_strip_ = 0;
  std::shared_ptr<uint8_t> data_;
  std::vector<float> bias_;
};

// Rows of bfloat16, and their codes where a weight in bits will meet them.
class Input {
 public:
  // Room for `rows` rows of `width`; the elements are written by the caller.
  uint16_t* get(int rows, int width);
  void borrow(const uint16_t* x, ptrdiff_t stride, int rows, int width);
  // Room for the codes of the rows, and, once a row is written, its codes.
  void reserve_codes();
  void quantize(const ProductKernels& kernels, int row);
  // Only the first `rows` are meant from now on.
  void shorten(int rows) { rows_ = rows; }
  // Rows `first` to `first + count - 1` as an input of their own, in the same memory; their codes are written through
  // it.
  Input part(int first, int count) const;

  int rows() const { return rows_; }
  // Row `first`, the first of one of the product's tiles, and those after it.
  InputRows tile(const ProductKernel& product, int first) const;

 private:
  int groups() const { return (width_ + kGroup - 1) / kGroup; }

  Scratch memory_, code_memory_;
  const uint16_t* x_ = nullptr;
  InputGroup* codes_ = nullptr;
  ptrdiff_t stride_ = 0;
  int rows_ = 0, width_ = 0;
};

// What a thread's products made ready: configuring the processor's tiles takes as long as twenty of their products.
class Ready {
 public:
  Ready() = default;
  Ready(const Ready&) = delete;
  Ready& operator=(const Ready&) = delete;
  ~Ready() {
    if (end_ != nullptr) end_();
  }
  void prepare(const ProductKernel& product, int rows) {
    if (product.begin == nullptr || (product.begin == begin_ && rows == rows_)) return;
    product.begin(rows);
    begin_ = product.begin, end_ = product.end, rows_ = rows;
  }

 private:
  void (*begin_)(int rows) = nullptr;
  void (*end_)() = nullptr;
  int rows_ = 0;
};

// A tile of rows' products with one strip.
class Tile {
 public:
  Tile(const LinearKernels& kernels, const Linear& linear, int strip, Ready& ready)
      : product_(kernels.product(linear.format())), linear_(linear), strip_(strip), ready_(ready) {}

  int most_rows() const { return product_.row_tile; }
  // At most kMostTileRows rows, from a multiple of most_rows() on.
  void multiply(const Input& input, int first, int count) {
    for (int done = 0; done < count; done += most_rows()) {
      const int rows = count - done < most_rows() ? count - done : most_rows();
      ready_.prepare(product_, rows);
      product_.multiply(input.tile(product_, first + done), rows, linear_.in(), linear_.strip(strip_),
                        products_ + done * kStrip);
    }
    for (int r = 0; r < count; ++r) linear_.add_bias(strip_ * kStrip, linear_.columns(strip_), products_ + r * kStrip);
  }
  const float* row(int r) const { return products_ + r * kStrip; }

 private:
  const ProductKernel& product_;
  const Linear& linear_;
  const int strip_;
  Ready& ready_;
  alignas(64) float products_[kMostTileRows * kStrip];
};

// All rows times one strip; store(row, results) takes linear.columns(strip) results of a row.
template <class Store>
void multiply_strip(const LinearKernels& kernels, const Linear& linear, int strip, const Input& input,
                    const Store& store) {
  Ready ready;
  Tile tile(kernels, linear, strip, ready);
  for (int row = 0; row < input.rows(); row += tile.most_rows()) {
    const int count = input.rows() - row < tile.most_rows() ? input.rows() - row : tile.most_rows();
    tile.multiply(input, row, count);
    for (int r = 0; r < count; ++r) store(row + r, tile.row(r));
  }
}

// The same strip of two weights of one shape; store(row, results of a, of b).
template <class Store>
void multiply_pair(const LinearKernels& kernels, const Linear& a, const Linear& b, int strip, const Input& input,
                   const Store& store) {
  Ready ready;
  Tile left(kernels, a, strip, ready), right(kernels, b, strip, ready);
  // Codes lie in tiles of one size; only bfloat16's may be another.
  const int tile = b.grouped() ? right.most_rows() : left.most_rows();
  for (int row = 0; row < input.rows(); row += tile) {
    const int count = input.rows() - row < tile ? input.rows() - row : tile;
    left.multiply(input, row, count);
    right.multiply(input, row, count);
    for (int r = 0; r < count; ++r) store(row + r, left.row(r), right.row(r));
  }
}

// The weights of `count` outputs: float out[count][in].
void unpack_rows(const Linear& linear, const int64_t* rows, int count, float* out);

// task(strip) for every strip, neighbours by the same thread: what it asks for ahead of its products is its own.
void each_strip(Workers& workers, int strips, size_t strip_bytes, const std::function<void(int)>& task);

// task(row) for every row.
void each_row(Workers& workers, int rows, const std::function<void(int)>& task);

// y = x W^T + b; x bfloat16 [rows, in] with rows `stride` elements apart, y bfloat16 [rows, out], contiguous.
void apply_linear(Cpu& cpu, const Linear& linear, const uint16_t* x, ptrdiff_t stride, int rows, uint16_t* y);

}  // namespace kvbits
