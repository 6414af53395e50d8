#include "decoder.h"

#include <cstring>

#include "../numbers.h"

namespace kvbits {

Decoder::Decoder(const DecoderShape& shape, std::vector<DecoderLayer> layers, std::vector<float> final_norm,
                 const Linear& head)
    : shape_(shape),
      layers_(std::move(layers)),
      final_norm_(std::move(final_norm)),
      head_(head),
      grouped_(head.grouped()) {
  for (const DecoderLayer& layer : layers_) {
    for (const Linear* part : {layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down}) {
      grouped_ = grouped_ || part->grouped();
    }
  }
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
  const LinearKernels linear_kernels(cpu.kernels().isa);
  const RowKernels& kernels = linear_kernels.rows;
  Workers& workers = cpu.workers();
  const Workers::Burst burst(workers);
  const int hidden = shape_.hidden, dim = shape_.dim, inner = shape_.intermediate;
  const int key_at = shape_.heads * dim, value_at = key_at + shape_.kv_heads * dim;
  const int width = value_at + shape_.kv_heads * dim;
  const size_t all = rows;
  Lease lease(*this);
  Room& room = lease.room();
  auto* residual = reinterpret_cast<float*>(room.residual.get(all * hidden * 4));
  uint16_t* normed = room.normed.get(rows, hidden);
  auto* projected = reinterpret_cast<float*>(room.projected.get(all * width * 4));
  auto* heads = reinterpret_cast<uint16_t*>(room.heads.get(all * width * 2));
  uint16_t* attended = room.attended.get(rows, key_at);
  uint16_t* gated = room.gated.get(rows, inner);
  if (grouped_) {
    for (Input* input : {&room.normed, &room.attended, &room.gated}) input->reserve_codes();
  }
  const auto quantize = [&](Input& input, int row) {
    if (grouped_) input.quantize(linear_kernels.coded, row);
  };

  const auto norm = [&](const std::vector<float>& weight) {
    each_row(workers, rows, [&](int r) {
      kernels.norm(residual + static_cast<size_t>(r) * hidden, weight.data(), shape_.eps, hidden,
                   normed + static_cast<size_t>(r) * hidden);
      quantize(room.normed, r);
    });
  };
  const auto add_to_residual = [&](const Linear& linear, Input& x) {
    if (grouped_) each_row(workers, rows, [&](int r) { quantize(x, r); });
    each_strip(workers, linear.strips(), linear.strip_bytes(), [&](int strip) {
      const int column = strip * kStrip, columns = linear.columns(strip);
      multiply_strip(linear_kernels, linear, strip, x, [&](int row, const float* products) {
        float* to = residual + static_cast<size_t>(row) * hidden + column;
        for (int c = 0; c < columns; ++c) to[c] += products[c];
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
    const int first[] = {0, parts[0]->strips(), parts[0]->strips() + parts[1]->strips()};
    each_strip(workers, first[2] + parts[2]->strips(), parts[0]->strip_bytes(), [&](int task) {
      const int part = task >= first[2] ? 2 : task >= first[1] ? 1 : 0, strip = task - first[part];
      multiply_strip(linear_kernels, *parts[part], strip, room.normed, [&](int row, const float* products) {
        std::memcpy(projected + static_cast<size_t>(row) * width + starts[part] + strip * kStrip, products,
                    parts[part]->columns(strip) * sizeof(float));
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
    each_strip(workers, layer.gate->strips(), layer.gate->strip_bytes(), [&](int strip) {
      const int column = strip * kStrip, columns = layer.gate->columns(strip);
      multiply_pair(
          linear_kernels, *layer.gate, *layer.up, strip, room.normed, [&](int row, const float* gate, const float* up) {
            kernels.gate(gate, up, columns, shape_.activation, gated + static_cast<size_t>(row) * inner + column);
          });
    });
    add_to_residual(*layer.down, room.gated);
  }
  room.normed.shorten(count);
  for (int i = 0; i < count; ++i) {
    kernels.norm(residual + wanted[i] * hidden, final_norm_.data(), shape_.eps, hidden,
                 normed + static_cast<size_t>(i) * hidden);
    quantize(room.normed, i);
  }
  const size_t vocabulary = head_.out();
  each_strip(workers, head_.strips(), head_.strip_bytes(), [&](int strip) {
    multiply_strip(linear_kernels, head_, strip, room.normed, [&](int row, const float* products) {
      std::memcpy(logits + row * vocabulary + strip * kStrip, products, head_.columns(strip) * sizeof(float));
    });
  });
}

}  // namespace kvbits
