#include "decoder.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>

#include "../numbers.h"

namespace kvbits {
namespace {

constexpr int kSerialRows = 16;  // up to so many rows, work on rows alone is not worth waking the threads
constexpr int kRowsTask = 8;     // rows of such work that a thread takes at once

// task(row) for every row.
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

// Products of a tile of rows with two panels, of one weight or of two of the same format and inputs.
class Tile {
 public:
  Tile(const RowKernels& kernels, const Input& input) : kernels_(kernels), input_(input) {}

  void multiply(int row, int rows, const Linear& a, int a_panel, const Linear& b, int b_panel) {
    if (!a.coded()) {
      kernels_.multiply(input_.row(row), input_.stride(), rows, a.steps(), a.panel(a_panel), b.panel(b_panel),
                        products_);
      return;
    }
    kernels_.multiply_codes(input_.codes(row), input_.code_stride(), rows, a.steps(), a.codes(a_panel),
                            b.codes(b_panel), sums_);
    const int32_t *a_offsets = a.offsets(a_panel * kPanel), *b_offsets = b.offsets(b_panel * kPanel);
    for (int r = 0; r < rows; ++r) {
      const int32_t* sums = sums_ + r * kTwoPanels;
      float* to = this->row(r);
      for (int c = 0; c < kPanel; ++c) {
        to[c] = static_cast<float>(sums[c] - a_offsets[c]) * input_.step(row + r);
        to[c + kPanel] = static_cast<float>(sums[c + kPanel] - b_offsets[c]) * input_.step(row + r);
      }
    }
  }
  float* row(int r) { return products_ + r * kTwoPanels; }

 private:
  const RowKernels& kernels_;
  const Input& input_;
  alignas(64) float products_[kRowTile * kTwoPanels];
  alignas(64) int32_t sums_[kRowTile * kTwoPanels];
};

// All rows times two neighbouring panels of one weight; store(row, column, count, results) takes `count` results of a
// row from `column` on.
template <class Store>
void multiply_pair(const RowKernels& kernels, const Linear& linear, int pair, const Input& input, int rows,
                   const Store& store) {
  Tile tile(kernels, input);
  const int column = pair * kTwoPanels;
  const int columns = linear.out() - column < kTwoPanels ? linear.out() - column : kTwoPanels;
  for (int row = 0; row < rows; row += kRowTile) {
    const int count = rows - row < kRowTile ? rows - row : kRowTile;
    tile.multiply(row, count, linear, 2 * pair, linear, 2 * pair + 1);
    for (int r = 0; r < count; ++r) {
      linear.finish(column, columns, tile.row(r));
      store(row + r, column, columns, tile.row(r));
    }
  }
}

}  // namespace

Linear::Linear(const uint16_t* weight, const float* bias, int out, int in) : out_(out), in_(in) {
  pack(weight);
  if (bias != nullptr) bias_.assign(bias, bias + out);
}

Linear::Linear(const int8_t* codes, const float* scales, const float* bias, int out, int in, int code_zero)
    : out_(out), in_(in), scales_(scales, scales + out), offsets_(panel_pairs() * kTwoPanels) {
  pack(codes);
  for (int o = 0; o < out; ++o) {
    for (int i = 0; i < in; ++i) offsets_[o] += code_zero * codes[static_cast<size_t>(o) * in + i];
  }
  if (bias != nullptr) bias_.assign(bias, bias + out);
}

template <class T>
void Linear::pack(const T* weight) {
  constexpr int kGroup = 4 / sizeof(T);
  const size_t panel = static_cast<size_t>(steps()) * kPanel * kGroup;
  const size_t bytes = (panel_pairs() * 2 * panel * sizeof(T) + 63) / 64 * 64;
  data_.reset(std::aligned_alloc(64, bytes));
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(data_.get(), 0, bytes);
  for (int o = 0; o < out_; ++o) {
    T* column = static_cast<T*>(data_.get()) + o / kPanel * panel + o % kPanel * kGroup;
    const T* row = weight + static_cast<size_t>(o) * in_;
    for (int i = 0; i < in_; ++i) column[i / kGroup * kPanel * kGroup + i % kGroup] = row[i];
  }
}

void Linear::finish(int column, int count, float* products) const {
  if (coded()) {
    for (int c = 0; c < count; ++c) products[c] *= scales_[column + c];
  }
  if (!bias_.empty()) {
    for (int c = 0; c < count; ++c) products[c] += bias_[column + c];
  }
}

void Linear::Free::operator()(void* p) const { std::free(p); }

uint16_t* Input::get(int rows, int width) {
  // Products read pairs, so an odd width needs one element more at the very end.
  auto* x = reinterpret_cast<uint16_t*>(memory_.get((static_cast<size_t>(rows) * width + 1) * sizeof(uint16_t)));
  borrow(x, width, width);
  return x;
}

void Input::borrow(const uint16_t* x, ptrdiff_t stride, int width) { x_ = x, stride_ = stride, width_ = width; }

void Input::reserve_codes(int rows) {
  code_stride_ = (width_ + 3) / 4 * 4;
  codes_ = code_memory_.get(static_cast<size_t>(rows) * code_stride_);
  steps_ = reinterpret_cast<float*>(step_memory_.get(rows * sizeof(float)));
}

void Input::quantize(const RowKernels& kernels, int r) {
  steps_[r] = kernels.quantize(row(r), width_, codes_ + static_cast<ptrdiff_t>(r) * code_stride_);
}

void apply_linear(Cpu& cpu, const Linear& linear, const uint16_t* x, ptrdiff_t stride, int rows, uint16_t* y) {
  const RowKernels& kernels = rows_for(cpu.kernels().isa);
  Input input;
  input.borrow(x, stride, linear.in());
  if (linear.coded()) {
    input.reserve_codes(rows);
    each_row(cpu.workers(), rows, [&](int r) { input.quantize(kernels, r); });
  }
  cpu.workers().run(linear.panel_pairs(), [&](int pair, int) {
    multiply_pair(kernels, linear, pair, input, rows, [&](int row, int column, int count, const float* products) {
      kernels.round(products, count, y + static_cast<size_t>(row) * linear.out() + column);
    });
  });
}

// A room for one call.
class Decoder::Lease {
 public:
  explicit Lease(Decoder& decoder) : decoder_(decoder) {
    const std::lock_guard<std::mutex> lock(decoder_.mutex_);
    if (decoder_.rooms_.empty()) {
      room_ = std::make_unique<Room>();
    } else {
      room_ = std::move(decoder_.rooms_.back());
      decoder_.rooms_.pop_back();
    }
  }
  ~Lease() {
    const std::lock_guard<std::mutex> lock(decoder_.mutex_);
    decoder_.rooms_.push_back(std::move(room_));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Room& room() { return *room_; }

 private:
  Decoder& decoder_;
  std::unique_ptr<Room> room_;
};

void Decoder::forward(Cpu& cpu, const std::vector<const Layer*>& caches, const Batch& batch, int rows,
                      const uint16_t* embedded, const float* cos, const float* sin, const int64_t* wanted, int count,
                      float* logits) {
  const RowKernels& kernels = rows_for(cpu.kernels().isa);
  Workers& workers = cpu.workers();
  const Workers::Burst burst(workers);
  const int hidden = shape_.hidden, dim = shape_.dim, inner = shape_.intermediate;
  const int key_at = shape_.heads * dim, value_at = key_at + shape_.kv_heads * dim;
  const int width = value_at + shape_.kv_heads * dim;
  const size_t all = rows;
  Lease lease(*this);
  Room& room = lease.room();
  auto* residual = reinterpret_cast<float*>(room.residual.get(all * hidden * 4));
  const bool coded = head_.coded();
  uint16_t* normed = room.normed.get(rows, hidden);
  auto* projected = reinterpret_cast<float*>(room.projected.get(all * width * 4));
  auto* heads = reinterpret_cast<uint16_t*>(room.heads.get(all * width * 2));
  uint16_t* attended = room.attended.get(rows, key_at);
  uint16_t* gated = room.gated.get(rows, inner);
  if (coded) {
    for (Input* input : {&room.normed, &room.attended, &room.gated}) input->reserve_codes(rows);
  }

  const auto norm = [&](const std::vector<float>& weight) {
    each_row(workers, rows, [&](int r) {
      kernels.norm(residual + static_cast<size_t>(r) * hidden, weight.data(), shape_.eps, hidden,
                   normed + static_cast<size_t>(r) * hidden);
      if (coded) room.normed.quantize(kernels, r);
    });
  };
  const auto add_to_residual = [&](const Linear& linear, Input& x) {
    if (coded) each_row(workers, rows, [&](int r) { x.quantize(kernels, r); });
    workers.run(linear.panel_pairs(), [&](int pair, int) {
      multiply_pair(kernels, linear, pair, x, rows, [&](int row, int column, int n, const float* products) {
        float* to = residual + static_cast<size_t>(row) * hidden + column;
        for (int c = 0; c < n; ++c) to[c] += products[c];
      });
    });
  };

  each_row(workers, rows, [&](int r) {
    for (int i = 0; i < hidden; ++i) {
      residual[static_cast<size_t>(r) * hidden + i] = bf16_to_float(embedded[static_cast<size_t>(r) * hidden + i]);
    }
  });
  for (size_t l = 0; l < layers_.size(); ++l) {
    const DecoderLayer& layer = layers_[l];
    norm(layer.input_norm);
    const Linear* parts[] = {layer.query, layer.key, layer.value};
    const int starts[] = {0, key_at, value_at};
    const int first[] = {0, parts[0]->panel_pairs(), parts[0]->panel_pairs() + parts[1]->panel_pairs()};
    workers.run(first[2] + parts[2]->panel_pairs(), [&](int task, int) {
      const int part = task >= first[2] ? 2 : task >= first[1] ? 1 : 0;
      multiply_pair(kernels, *parts[part], task - first[part], room.normed, rows,
                    [&](int row, int column, int n, const float* products) {
                      std::memcpy(projected + static_cast<size_t>(row) * width + starts[part] + column, products,
                                  n * sizeof(float));
                    });
    });
    each_row(workers, rows, [&](int r) {
      const float* from = projected + static_cast<size_t>(r) * width;
      uint16_t* to = heads + static_cast<size_t>(r) * width;
      const float *c = cos + static_cast<size_t>(r) * shape_.rotated,
                  *s = sin + static_cast<size_t>(r) * shape_.rotated;
      for (int h = 0; h < shape_.heads + shape_.kv_heads; ++h) {
        const std::vector<float>& weight = h < shape_.heads ? layer.query_norm : layer.key_norm;
        kernels.rotate(from + h * dim, weight.empty() ? nullptr : weight.data(), shape_.eps, dim, c, s,
                       shape_.rotated / 2, to + h * dim);
      }
      kernels.round(from + value_at, shape_.kv_heads * dim, to + value_at);
    });
    cpu.forward(*caches[l], batch,
                Rows{Float::kBf16, heads, heads + key_at, heads + value_at, width, dim, width, dim, width, dim, nullptr,
                     attended});
    add_to_residual(*layer.output, room.attended);
    norm(layer.mlp_norm);
    workers.run(layer.gate->out() / kPanel + (layer.gate->out() % kPanel != 0), [&](int panel, int) {
      Tile tile(kernels, room.normed);
      const int column = panel * kPanel, columns = inner - column < kPanel ? inner - column : kPanel;
      for (int row = 0; row < rows; row += kRowTile) {
        const int n = rows - row < kRowTile ? rows - row : kRowTile;
        tile.multiply(row, n, *layer.gate, panel, *layer.up, panel);
        for (int r = 0; r < n; ++r) {
          float* products = tile.row(r);
          layer.gate->finish(column, columns, products);
          layer.up->finish(column, columns, products + kPanel);
          kernels.gate(products, products + kPanel, columns, shape_.activation,
                       gated + static_cast<size_t>(row + r) * inner + column);
        }
      }
    });
    add_to_residual(*layer.down, room.gated);
  }
  for (int i = 0; i < count; ++i) {
    kernels.norm(residual + wanted[i] * hidden, final_norm_.data(), shape_.eps, hidden,
                 normed + static_cast<size_t>(i) * hidden);
    if (coded) room.normed.quantize(kernels, i);
  }
  const size_t vocabulary = head_.out();
  workers.run(head_.panel_pairs(), [&](int pair, int) {
    multiply_pair(kernels, head_, pair, room.normed, count, [&](int row, int column, int n, const float* products) {
      std::memcpy(logits + row * vocabulary + column, products, n * sizeof(float));
    });
  });
}

}  // namespace kvbits
