// Storing a step's rows: into 16-bit pages, and from a full one into its sealed page.
#include <cstring>
#include <vector>

#include "numbers.h"
#include "step.h"

namespace kvbits {

namespace {
inline uint16_t as_bf16(uint16_t x) { return x; }
inline uint16_t as_bf16(float x) { return bf16_from_float(x); }

// Tokens [first, last) of a page from rows `stride` elements apart, in the order of src/kvbits/codecs/raw.py.
template <class T>
void store_keys(const T* rows, int64_t stride, int first, int last, int dim, uint8_t* page) {
  auto* out = reinterpret_cast<uint16_t*>(page);
  for (int t = first; t < last; ++t, rows += stride) {
    for (int c = 0; c < dim; ++c) out[((c / 2) * kPage + t) * 2 + c % 2] = as_bf16(rows[c]);
  }
}
template <class T>
void store_values(const T* rows, int64_t stride, int first, int last, int dim, uint8_t* page) {
  auto* out = reinterpret_cast<uint16_t*>(page);
  for (int t = first; t < last; ++t, rows += stride) {
    for (int c = 0; c < dim; ++c) out[((t / 2) * dim + c) * 2 + t % 2] = as_bf16(rows[c]);
  }
}

// `plain`: to nearest, as the sink is.
Rounding rounding(const float* feedback, const int32_t* order, const float* clip, int head, int dim, bool plain) {
  return {feedback == nullptr || plain ? nullptr : feedback + static_cast<size_t>(head) * dim * dim,
          order == nullptr || plain ? nullptr : order + static_cast<size_t>(head) * dim,
          clip == nullptr || plain ? 1.0f : clip[head]};
}

struct Job {
  int s, page, head;
};
}  // namespace

void Cpu::append(const Layer& layer, const Batch& batch, const Rows& rows, const Pages& pages) {
  const int value_dim = layer.latent ? 0 : layer.value_dim;  // those that are stored
  std::vector<Job> jobs;
  for (int s = 0; s < batch.sequences; ++s)
    for (int page = pages.first_page(s); page <= pages.last_page(s); ++page)
      for (int head = 0; head < layer.kv_heads; ++head) jobs.push_back({s, page, head});

  const auto store = [&](int index, int) {
    const auto [s, page, head] = jobs[index];
    const int start = batch.starts[s], end = start + batch.counts[s];
    const int from = start > page * kPage ? start : page * kPage;
    const int to = end < (page + 1) * kPage ? end : (page + 1) * kPage;
    const int64_t row = batch.rows[s] + (from - start);
    uint8_t* keys = pages.open(s, page, head);
    uint8_t* values = keys + layer.open.value_offset;
    const int first = from - page * kPage, last = to - page * kPage;
    // A weight of 0 must not meet what an earlier owner left in the rows to come: it may be no number.
    if (first == 0) {
      std::memset(layer.latent ? keys : values, 0,
                  static_cast<size_t>(kPage) * (layer.latent ? layer.key_dim : layer.value_dim) * sizeof(uint16_t));
    }
    const int64_t key_at = row * rows.key_row + head * rows.key_head;
    const int64_t value_at = row * rows.value_row + head * rows.value_head;
    if (rows.dtype == Float::kF32) {
      store_keys(static_cast<const float*>(rows.key) + key_at, rows.key_row, first, last, layer.key_dim, keys);
      store_values(static_cast<const float*>(rows.value) + value_at, rows.value_row, first, last, value_dim, values);
    } else {
      store_keys(static_cast<const uint16_t*>(rows.key) + key_at, rows.key_row, first, last, layer.key_dim, keys);
      store_values(static_cast<const uint16_t*>(rows.value) + value_at, rows.value_row, first, last, value_dim, values);
    }
    if (last == kPage) {
      const Place& place = pages.sealed_place(page);
      uint8_t* sealed = pages.sealed(s, page, head);
      const bool plain = pages.is_sink(page);
      kernels_.seal_key(place.key_codec)(
          keys, layer.key_dim,
          rounding(layer.key_feedback, layer.key_order, layer.key_clip, head, layer.key_dim, plain), sealed);
      if (layer.latent) return;
      kernels_.seal_value(place.value_codec)(
          values, layer.value_dim,
          rounding(layer.value_feedback, layer.value_order, layer.value_clip, head, layer.value_dim, plain),
          sealed + place.value_offset);
    }
  };
  // Waking threads costs more than storing a decode step's few rows.
  if (batch.rows[batch.sequences] <= kPage) {
    for (size_t i = 0; i < jobs.size(); ++i) store(static_cast<int>(i), 0);
  } else {
    workers_.run(static_cast<int>(jobs.size()), store);
  }
}

}  // namespace kvbits
