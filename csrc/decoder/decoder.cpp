#include "decoder.h"

#include <algorithm>
#include <cstring>

#include "../numbers.h"

namespace kvbits {
namespace {
bool has_codes(const DecoderLayer& layer) {
  bool found = layer.mixture.experts != nullptr && layer.mixture.experts->grouped();
  for (const Linear* part : {layer.query, layer.key, layer.value, layer.output, layer.gate, layer.up, layer.down}) {
    found = found || (part != nullptr && part->grouped());
  }
  return found;
}
}  // namespace

Decoder::Decoder(const DecoderShape& shape, std::vector<DecoderLayer> layers, std::vector<float> final_norm,
                 const Linear& head)
    : shape_(shape),
      layers_(std::move(layers)),
      final_norm_(std::move(final_norm)),
      head_(head),
      grouped_(head.grouped() || std::any_of(layers_.begin(), layers_.end(), has_codes)) {}

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

// One call: the residual stream of all rows, and what the layers do to it.
class Decoder::Step {
 public:
  Step(const Decoder& decoder, Cpu& cpu, const Batch& batch, int rows, Room& room)
      : decoder_(decoder),
        shape_(decoder.shape_),
        cpu_(cpu),
        workers_(cpu.workers()),
        batch_(batch),
        rows_(rows),
        room_(room),
        products_(cpu.kernels().isa),
        kernels_(products_.rows),
        key_at_(shape_.heads * shape_.dim),
        value_at_(key_at_ + shape_.kv_heads * shape_.dim),
        width_(value_at_ + shape_.kv_heads * shape_.dim) {
    residual_ = floats(room.residual, shape_.hidden);
    block_ = floats(room.block, shape_.hidden);
    projected_ = floats(room.projected, width_);
    heads_ = reinterpret_cast<uint16_t*>(room.heads.get(static_cast<size_t>(rows) * width_ * sizeof(uint16_t)));
    normed_ = room.normed.get(rows, shape_.hidden);
    attended_ = room.attended.get(rows, key_at_);
    if (decoder.grouped_) {
      room.normed.reserve(products_.coded);
      room.attended.reserve(products_.coded);
    }
  }

  void embed(const uint16_t* embedded) {
    const auto hidden = static_cast<size_t>(shape_.hidden);
    each_row(workers_, rows_, [&](int r) {
      for (size_t i = r * hidden; i < (r + 1) * hidden; ++i) residual_[i] = bf16_to_float(embedded[i]);
    });
  }

  void run(const DecoderLayer& layer, const Layer& cache, const float* cos, const float* sin) {
    norm(layer.input_norm);
    project(layer);
    const size_t table = static_cast<size_t>(layer.rope) * rows_ * shape_.rotated;
    rotate(layer, cos + table, sin + table);
    cpu_.forward(cache, batch_,
                 Rows{Float::kBf16, heads_, heads_ + key_at_, heads_ + value_at_, width_, shape_.dim, width_,
                      shape_.dim, width_, shape_.dim, layer.sinks.empty() ? nullptr : layer.sinks.data(), attended_});
    add(*layer.output, room_.attended, layer.attention_norm);
    norm(layer.mlp_norm);
    if (layer.mixture.experts != nullptr) {
      mix(layer.mixture, layer.output_norm);
    } else {
      gate(layer);
      add(*layer.down, room_.gated, layer.output_norm);
    }
  }

  void finish(const int64_t* wanted, int count, float* logits) {
    const Linear& head = decoder_.head_;
    room_.normed.shorten(count);
    for (int i = 0; i < count; ++i) {
      kernels_.norm(residual_ + wanted[i] * shape_.hidden, decoder_.final_norm_.data(), shape_.eps, shape_.hidden,
                    normed_ + static_cast<size_t>(i) * shape_.hidden);
      quantize(room_.normed, i);
    }
    multiply(head, room_.normed, logits, head.out(), [&](float* to, int columns) {
      if (shape_.soft_cap > 0) kernels_.soft_cap(to, shape_.soft_cap, columns);
    });
  }

 private:
  float* floats(Scratch& memory, int width) const {
    return reinterpret_cast<float*>(memory.get(static_cast<size_t>(rows_) * width * sizeof(float)));
  }
  static float* row(float* x, int r, int width) { return x + static_cast<size_t>(r) * width; }

  void quantize(Input& input, int r) const {
    if (decoder_.grouped_) input.prepare(products_.coded, r);
  }

  void norm(const std::vector<float>& weight) {
    each_row(workers_, rows_, [&](int r) {
      const float* from = row(residual_, r, shape_.hidden);
      uint16_t* to = normed_ + static_cast<size_t>(r) * shape_.hidden;
      if (weight.empty()) {
        kernels_.round(from, shape_.hidden, to);
      } else {
        kernels_.norm(from, weight.data(), shape_.eps, shape_.hidden, to);
      }
      quantize(room_.normed, r);
    });
  }

  // The products of all rows of `x` with `linear`, to rows of `out` that are `width` apart; done(results, how many).
  template <class Done>
  void multiply(const Linear& linear, const Input& x, float* out, size_t width, const Done& done) {
    each_strip(workers_, linear.strips(), linear.strip_bytes(), [&](int strip) {
      multiply_strip(products_, linear, strip, x, [&](int r, const float* products) {
        float* to = out + r * width + strip * kStrip;
        std::memcpy(to, products, linear.columns(strip) * sizeof(float));
        done(to, linear.columns(strip));
      });
    });
  }

  void project(const DecoderLayer& layer) {
    const Linear* parts[] = {layer.query, layer.key, layer.value};
    const int starts[] = {0, key_at_, value_at_};
    const int first[] = {0, parts[0]->strips(), parts[0]->strips() + parts[1]->strips()};
    each_strip(workers_, first[2] + parts[2]->strips(), parts[0]->strip_bytes(), [&](int task) {
      const int part = task >= first[2] ? 2 : task >= first[1] ? 1 : 0, strip = task - first[part];
      multiply_strip(products_, *parts[part], strip, room_.normed, [&](int r, const float* products) {
        std::memcpy(row(projected_, r, width_) + starts[part] + strip * kStrip, products,
                    parts[part]->columns(strip) * sizeof(float));
      });
    });
  }

  void rotate(const DecoderLayer& layer, const float* cos, const float* sin) {
    each_row(workers_, rows_, [&](int r) {
      float* from = row(projected_, r, width_);
      uint16_t* to = heads_ + static_cast<size_t>(r) * width_;
      const size_t angle = static_cast<size_t>(r) * shape_.rotated;
      const auto part = [&](const std::vector<float>& weight, int begin, int heads) {
        const bool of_each = static_cast<int>(weight.size()) == shape_.dim;
        if (!weight.empty() && !of_each) {
          kernels_.normalize(from + begin, weight.data(), shape_.eps, heads * shape_.dim);
        }
        for (int at = begin; at < begin + heads * shape_.dim; at += shape_.dim) {
          kernels_.rotate(from + at, of_each ? weight.data() : nullptr, shape_.eps, shape_.dim, cos + angle,
                          sin + angle, shape_.rotated / 2, to + at);
        }
      };
      part(layer.query_norm, 0, shape_.heads);
      part(layer.key_norm, key_at_, shape_.kv_heads);
      kernels_.round(from + value_at_, shape_.kv_heads * shape_.dim, to + value_at_);
    });
  }

  // Adds x times `linear` to the residual stream, through the norm `after` where there is one.
  void add(const Linear& linear, Input& x, const std::vector<float>& after) {
    if (decoder_.grouped_) each_row(workers_, rows_, [&](int r) { quantize(x, r); });
    if (!after.empty()) {
      multiply(linear, x, block_, shape_.hidden, [](float*, int) {});
      return add_normed(after);
    }
    each_strip(workers_, linear.strips(), linear.strip_bytes(), [&](int strip) {
      multiply_strip(products_, linear, strip, x, [&](int r, const float* products) {
        float* to = row(residual_, r, shape_.hidden) + strip * kStrip;
        for (int c = 0; c < linear.columns(strip); ++c) to[c] += products[c];
      });
    });
  }

  void add_normed(const std::vector<float>& weight) {
    each_row(workers_, rows_, [&](int r) {
      float *from = row(block_, r, shape_.hidden), *to = row(residual_, r, shape_.hidden);
      kernels_.normalize(from, weight.data(), shape_.eps, shape_.hidden);
      for (int i = 0; i < shape_.hidden; ++i) to[i] += from[i];
    });
  }

  void gate(const DecoderLayer& layer) {
    const int inner = layer.gate->out();
    uint16_t* gated = room_.gated.get(rows_, inner);
    if (decoder_.grouped_) room_.gated.reserve(products_.coded);
    each_strip(workers_, layer.gate->strips(), layer.gate->strip_bytes(), [&](int strip) {
      multiply_pair(products_, *layer.gate, *layer.up, strip, room_.normed,
                    [&](int r, const float* left, const float* right) {
                      kernels_.gate(left, right, layer.gate->columns(strip), shape_.gate,
                                    gated + static_cast<size_t>(r) * inner + strip * kStrip);
                    });
    });
  }

  void mix(const Mixture& mixture, const std::vector<float>& after) {
    const int experts = mixture.experts->count(), chosen = mixture.chosen;
    float *logits = floats(room_.router, experts), *shares = floats(room_.shares, chosen);
    auto* indices = reinterpret_cast<int32_t*>(floats(room_.chosen, chosen));
    multiply(*mixture.router, room_.normed, logits, experts, [](float*, int) {});
    each_row(workers_, rows_, [&](int r) {
      const size_t at = static_cast<size_t>(r) * chosen;
      choose_experts(row(logits, r, experts), experts, chosen, mixture.among_chosen, indices + at, shares + at);
    });
    float* sums = after.empty() ? residual_ : block_;
    if (!after.empty()) std::fill_n(sums, static_cast<size_t>(rows_) * shape_.hidden, 0.0f);
    mixture.experts->add(workers_, products_, normed_, rows_, Choice{chosen, indices, shares}, sums, room_.experts);
    if (!after.empty()) add_normed(after);
  }

  const Decoder& decoder_;
  const DecoderShape& shape_;
  Cpu& cpu_;
  Workers& workers_;
  const Batch& batch_;
  const int rows_;
  Room& room_;
  const LinearKernels products_;
  const RowKernels& kernels_;
  const int key_at_, value_at_, width_;
  float *residual_, *block_, *projected_;
  uint16_t *heads_, *normed_, *attended_;
};

void Decoder::forward(Cpu& cpu, const std::vector<const Layer*>& caches, const Batch& batch, int rows,
                      const uint16_t* embedded, const float* cos, const float* sin, const int64_t* wanted, int count,
                      float* logits) {
  const Workers::Burst burst(cpu.workers());
  Lease lease(*this);
  Step step(*this, cpu, batch, rows, lease.room());
  step.embed(embedded);
  for (size_t l = 0; l < layers_.size(); ++l) step.run(layers_[l], *caches[l], cos, sin);
  step.finish(wanted, count, logits);
}

}  // namespace kvbits
