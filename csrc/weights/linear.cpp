#include "linear.h"

#include <cstring>

namespace kvbits {
namespace {
constexpr int kSerialRows = 16;            // up to so many rows, work on rows alone is not worth waking the threads
constexpr int kRowsTask = 8;               // rows of such work that a thread takes at once
constexpr size_t kStripsTask = 256 << 10;  // bytes of strips that a thread takes at once, at most,
constexpr int kTasks = 8;                  // unless that leaves fewer tasks for each thread
}  // namespace

void each_strip(Workers& workers, int strips, size_t strip_bytes, const std::function<void(int)>& task) {
  const int by_bytes = static_cast<int>(kStripsTask / (strip_bytes + 1)),
            by_count = strips / (workers.threads() * kTasks);
  const int smaller = by_bytes < by_count ? by_bytes : by_count, count = smaller > 1 ? smaller : 1;
  workers.run((strips + count - 1) / count, [&](int index, int) {
    const int last = (index + 1) * count < strips ? (index + 1) * count : strips;
    for (int s = index * count; s < last; ++s) task(s);
  });
}

void each_row(Workers& workers, int rows, const std::function<void(int)>& task) {
  if (rows <= kSerialRows) {
    for (int r = 0; r < rows; ++r) task(r);
    return;
  }
  workers.run((rows + kRowsTask - 1) / kRowsTask, [&](int index, int) {
    const int last = (index + 1) * kRowsTask < rows ? (index + 1) * kRowsTask : rows;
    for (int r = index * kRowsTask; r < last; ++r) task(r);
  });
}

Linear::Linear(int format, const float* bias, int out, int in) : format_(*weight_format(format)), out_(out), in_(in) {
  data_ = weight_memory(bytes());
  if (bias != nullptr) bias_.assign(bias, bias + out);
}

Linear::Linear(const Linear& whole, int first, int out)
    : format_(whole.format_),
      out_(out),
      in_(whole.in_),
      first_strip_(whole.first_strip_ + first / kStrip),
      data_(whole.data_) {
  if (!whole.bias_.empty()) bias_.assign(whole.bias_.begin() + first, whole.bias_.begin() + first + out);
}

void Linear::fill(const uint8_t* stored, size_t row_bytes, const int64_t* order, int first, int last) {
  for (int s = first; s < last; ++s) {
    uint8_t* strip = data_.get() + (first_strip_ + s) * strip_bytes();
    if (columns(s) < kStrip) std::memset(strip, 0, strip_bytes());
    for (int r = 0; r < columns(s); ++r) {
      const int64_t row = s * kStrip + r;
      const uint8_t* from = stored + (order == nullptr ? row : order[row]) * row_bytes;
      for (int b = 0; b < blocks(); ++b) {
        format_.pack(from + static_cast<size_t>(b) * format_.stored_bytes, r,
                     strip + static_cast<size_t>(b) * format_.strip_bytes);
      }
    }
  }
}

void Linear::unpack(int row, float* out) const {
  const uint8_t* from = strip(row / kStrip);
  for (int b = 0; b < blocks(); ++b, from += format_.strip_bytes, out += format_.block_inputs) {
    format_.unpack(from, row % kStrip, out);
  }
}

void unpack_rows(const Linear& linear, const int64_t* rows, int count, float* out) {
  std::vector<float> row(static_cast<size_t>(linear.blocks()) * linear.block_inputs());
  for (int i = 0; i < count; ++i, out += linear.in()) {
    linear.unpack(static_cast<int>(rows[i]), row.data());
    std::memcpy(out, row.data(), linear.in() * sizeof(float));
  }
}

void Linear::add_bias(int column, int count, float* products) const {
  if (bias_.empty()) return;
  for (int c = 0; c < count; ++c) products[c] += bias_[column + c];
}

uint16_t* Input::get(int rows, int width) {
  // Products read pairs, so an odd width needs one element more at the very end.
  auto* x = reinterpret_cast<uint16_t*>(memory_.get((static_cast<size_t>(rows) * width + 1) * sizeof(uint16_t)));
  borrow(x, width, rows, width);
  return x;
}

void Input::borrow(const uint16_t* x, ptrdiff_t stride, int rows, int width) {
  x_ = x, stride_ = stride, rows_ = rows, width_ = width;
}

Input Input::part(int first, int count) const {
  Input input;
  input.borrow(x_ + first * stride_, stride_, count, width_);
  input.group_bytes_ = group_bytes_;
  input.prepared_ = prepared_ == nullptr ? nullptr : prepared_ + groups_before(first);
  return input;
}

void Input::reserve(const ProductKernels& kernels) {
  group_bytes_ = kernels.group_bytes;
  // Tiles read those of whole blocks of rows.
  prepared_ = code_memory_.get(groups_before(rows_) + kMostTileRows * group_bytes_);
}

void Input::prepare(const ProductKernels& kernels, int row) {
  const int tile = row / kernels.row_tile * kernels.row_tile;
  const int count = rows_ - tile < kernels.row_tile ? rows_ - tile : kernels.row_tile;
  kernels.prepare(x_ + row * stride_, width_, count, prepared_ + groups_before(tile) + (row - tile) * group_bytes_);
}

InputRows Input::tile(int first, int count) const {
  const auto* groups = prepared_ == nullptr ? nullptr : prepared_ + groups_before(first);
  return InputRows{x_ + first * stride_, stride_, reinterpret_cast<const InputGroup*>(groups), count};
}

void apply_linear(Cpu& cpu, const Linear& linear, const uint16_t* x, ptrdiff_t stride, int rows, uint16_t* y) {
  const LinearKernels kernels(cpu.kernels().isa);
  Input input;
  input.borrow(x, stride, rows, linear.in());
  if (linear.grouped()) {
    input.reserve(kernels.coded);
    each_row(cpu.workers(), rows, [&](int r) { input.prepare(kernels.coded, r); });
  }
  each_strip(cpu.workers(), linear.strips(), linear.strip_bytes(), [&](int strip) {
    multiply_strip(kernels, linear, strip, input, [&](int row, const float* products) {
      kernels.rows.round(products, linear.columns(strip), y + static_cast<size_t>(row) * linear.out() + strip * kStrip);
    });
  });
}

}  // namespace kvbits
