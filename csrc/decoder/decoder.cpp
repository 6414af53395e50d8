#include "decoder.h"

#include <sys/mman.h>

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

// store(row, column, count, products) takes `count` products of a row from `column` on, bias included.
using Store = std::function<void(int, int, int, const float*)>;

void add_bias(const Linear& linear, int column, int count, float* products) {
  if (linear.bias() == nullptr) return;
  for (int c = 0; c < count; ++c) products[c] += linear.bias()[column + c];
}

// The products of all rows with two neighbouring panels of one weight.
void multiply_pair(const RowKernels& kernels, const Linear& linear, int pair, const uint16_t* x, ptrdiff_t stride,
                   int rows, const Store& store) {
  alignas(64) float tile[kRowTile * kTwoPanels];
  const int column = pair * kTwoPanels;
  const int columns = linear.out() - column < kTwoPanels ? linear.out() - column : kTwoPanels;
  for (int row = 0; row < rows; row += kRowTile) {
    const int count = rows - row < kRowTile ? rows - row : kRowTile;
    kernels.multiply(x + row * stride, stride, count, linear.pairs(), linear.panel(2 * pair), linear.panel(2 * pair + 1),
                     tile);
    for (int r = 0; r < count; ++r) {
      float* products = tile + r * kTwoPanels;
      add_bias(linear, column, columns, products);
      store(row + r, column, columns, products);
    }
  }
}

}  // namespace

Linear::Linear(const uint16_t* weight, const float* bias, int out, int in) : out_(out), in_(in) {
  const size_t panel = static_cast<size_t>(pairs()) * kTwoPanels;
  const size_t bytes = (panel_pairs() * 2 * panel * sizeof(uint16_t) + 63) / 64 * 64;
  data_.reset(static_cast<uint16_t*>(std::aligned_alloc(64, bytes)));
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(data_.get(), 0, bytes);
  for (int o = 0; o < out; ++o) {
    uint16_t* column = data_.get() + o / kPanel * panel + o % kPanel * 2;
    const uint16_t* row = weight + static_cast<size_t>(o) * in;
    for (int i = 0; i < in; ++i) column[i / 2 * kTwoPanels + i % 2] = row[i];
  }
  if (bias != nullptr) bias_.assign(bias, bias + out);
}

void Linear::Free::operator()(uint16_t* p) const { std::free(p); }

void apply_linear(Cpu& cpu, const Linear& linear, const uint16_t* x, ptrdiff_t stride, int rows, uint16_t* y) {
  const RowKernels& kernels = rows_for(cpu.kernels().isa);
  cpu.workers().run(linear.panel_pairs(), [&](int pair, int) {
    multiply_pair(kernels, linear, pair, x, stride, rows, [&](int row, int column, int count, const float* products) {
      kernels.round(products, count, y + static_cast<size_t>(row) * linear.out() + column);
    });
  });
}

void Decoder::forward(Cpu& cpu, const std::vector<const Layer*>& caches, const Batch& batch, int rows,
                      const uint16_t* embedded, const float* cos, const float* sin, const int64_t* wanted, int count,
                      float* logits) {
  const RowKernels& kernels = rows_for(cpu.kernels().isa);
  Workers& workers = cpu.workers();
  const int hidden = shape_.hidden, dim = shape_.dim, inner = shape_.intermediate;
  const int key_at = shape_.heads * dim, value_at = key_at + shape_.kv_heads * dim;
  const int width = value_at + shape_.kv_heads * dim;
  const size_t all = rows;
  // Products read pairs, so an odd width needs one element more at the very end.
  auto* residual = reinterpret_cast<float*>(residual_.get(all * hidden * 4));
  auto* normed = reinterpret_cast<uint16_t*>(normed_.get((all * hidden + 1) * 2));
  auto* projected = reinterpret_cast<float*>(projected_.get(all * width * 4));
  auto* heads = reinterpret_cast<uint16_t*>(heads_.get(all * width * 2));
  auto* attended = reinterpret_cast<uint16_t*>(attended_.get((all * key_at + 1) * 2));
  auto* gated = reinterpret_cast<uint16_t*>(gated_.get((all * inner + 1) * 2));

  const auto norm = [&](const std::vector<float>& weight) {
    each_row(workers, rows, [&](int r) {
      kernels.norm(residual + static_cast<size_t>(r) * hidden, weight.data(), shape_.eps, hidden,
                   normed + static_cast<size_t>(r) * hidden);
    });
  };
  const auto add_to_residual = [&](const Linear& linear, const uint16_t* x) {
    workers.run(linear.panel_pairs(), [&](int pair, int) {
      multiply_pair(kernels, linear, pair, x, linear.in(), rows, [&](int row, int column, int n, const float* products) {
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
      multiply_pair(kernels, *parts[part], task - first[part], normed, hidden, rows,
                    [&](int row, int column, int n, const float* products) {
                      std::memcpy(projected + static_cast<size_t>(row) * width + starts[part] + column, products,
                                  n * sizeof(float));
                    });
    });
    each_row(workers, rows, [&](int r) {
      const float* from = projected + static_cast<size_t>(r) * width;
      uint16_t* to = heads + static_cast<size_t>(r) * width;
      const float *c = cos + static_cast<size_t>(r) * shape_.rotated, *s = sin + static_cast<size_t>(r) * shape_.rotated;
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
    add_to_residual(*layer.output, attended);
    norm(layer.mlp_norm);
    workers.run(layer.gate->out() / kPanel + (layer.gate->out() % kPanel != 0), [&](int panel, int) {
      alignas(64) float tile[kRowTile * kTwoPanels];
      const int column = panel * kPanel, columns = inner - column < kPanel ? inner - column : kPanel;
      for (int row = 0; row < rows; row += kRowTile) {
        const int n = rows - row < kRowTile ? rows - row : kRowTile;
        kernels.multiply(normed + static_cast<size_t>(row) * hidden, hidden, n, layer.gate->pairs(),
                         layer.gate->panel(panel), layer.up->panel(panel), tile);
        for (int r = 0; r < n; ++r) {
          float* products = tile + r * kTwoPanels;
          add_bias(*layer.gate, column, columns, products);
          add_bias(*layer.up, column, columns, products + kPanel);
          kernels.gate(products, products + kPanel, columns, shape_.activation,
                       gated + static_cast<size_t>(row + r) * inner + column);
        }
      }
    });
    add_to_residual(*layer.down, gated);
  }
  for (int i = 0; i < count; ++i) {
    kernels.norm(residual + wanted[i] * hidden, final_norm_.data(), shape_.eps, hidden,
                 normed + static_cast<size_t>(i) * hidden);
  }
  const size_t vocabulary = head_.out();
  workers.run(head_.panel_pairs(), [&](int pair, int) {
    multiply_pair(kernels, head_, pair, normed, hidden, count, [&](int row, int column, int n, const float* products) {
      std::memcpy(logits + row * vocabulary + column, products, n * sizeof(float));
    });
  });
}

}  // namespace kvbits
