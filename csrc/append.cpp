// Storing a step's rows: into 16-bit pages, and from a full one into its sealed form.
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "numbers.h"
#include "step.h"

namespace kvbits {

uint8_t* Scratch::get(size_t bytes) {
  if (bytes > size_) {
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, rounded)));
    if (!data_) throw std::bad_alloc();
    size_ = rounded;
  }
  return data_.get();
}

void Scratch::Free::operator()(uint8_t* p) const { std::free(p); }

uint8_t* Pages::open(int s, int page, int head) const {
  const int first = first_page(s);
  if (page == first) return in_open_frames(batch_.head, s, head);
  if (page == last_page(s) && ends_inside_page(s) && own_tail(s)) return tail(s, head);
  const size_t index = staging_first_[s] + (page - first - 1);
  return staging_ + (index * layer_.kv_heads + head) * layer_.open.head_bytes;
}

bool Pages::must_settle(int s) const { return last_page(s) > first_page(s) && ends_inside_page(s) && !own_tail(s); }

int Pages::staged(int s) const {
  const int later = last_page(s) - first_page(s);
  return later > 0 && ends_inside_page(s) && own_tail(s) ? later - 1 : later;
}

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
    if (first == 0) std::memset(values, 0, static_cast<size_t>(kPage) * layer.value_dim * sizeof(uint16_t));
    const int64_t key_at = row * rows.key_row + head * rows.key_head;
    const int64_t value_at = row * rows.value_row + head * rows.value_head;
    if (rows.dtype == Float::kF32) {
      store_keys(static_cast<const float*>(rows.key) + key_at, rows.key_row, first, last, layer.key_dim, keys);
      store_values(static_cast<const float*>(rows.value) + value_at, rows.value_row, first, last, layer.value_dim,
                   values);
    } else {
      store_keys(static_cast<const uint16_t*>(rows.key) + key_at, rows.key_row, first, last, layer.key_dim, keys);
      store_values(static_cast<const uint16_t*>(rows.value) + value_at, rows.value_row, first, last, layer.value_dim,
                   values);
    }
    if (last == kPage) {
      const Place& place = pages.sealed_place(page);
      uint8_t* sealed = pages.sealed(s, page, head);
      const bool plain = pages.is_sink(page);
      kernels_.seal_key(place.key_codec)(
          keys, layer.key_dim,
          rounding(layer.key_feedback, layer.key_order, layer.key_clip, head, layer.key_dim, plain), sealed);
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

void Cpu::settle(const Layer& layer, const Batch& batch, const Pages& pages) {
  for (int s = 0; s < batch.sequences; ++s) {
    if (!pages.must_settle(s)) continue;
    for (int head = 0; head < layer.kv_heads; ++head) {
      std::memcpy(pages.tail(s, head), pages.open(s, pages.last_page(s), head),
                  static_cast<size_t>(layer.open.head_bytes));
    }
  }
}

}  // namespace kvbits
