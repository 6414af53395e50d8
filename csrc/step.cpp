// A step: what it needs besides storing (append.cpp) and attending (attend.cpp), and their order.
#include "step.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

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

bool Pages::must_flush(int s) const { return last_page(s) > first_page(s) && ends_inside_page(s) && !own_tail(s); }

int Pages::staged(int s) const {
  const int later = last_page(s) - first_page(s);
  return later > 0 && ends_inside_page(s) && own_tail(s) ? later - 1 : later;
}

const char* Cpu::supports(const Layer& layer) const {
  if (!kernels_.key(layer.sealed.key_codec)) return "no kernel for the key codec";
  if (!kernels_.value(layer.sealed.value_codec)) return "no kernel for the value codec";
  return nullptr;
}

void Cpu::forward(const Layer& layer, const Batch& batch, const Rows& rows, bool again) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int32_t> staging_first(batch.sequences);
  const Pages unstaged(layer, batch, nullptr, staging_first.data());
  size_t staged = 0;
  for (int s = 0; s < batch.sequences; ++s) {
    staging_first[s] = static_cast<int32_t>(staged);
    staged += unstaged.staged(s);
  }
  uint8_t* staging = staging_.get(staged * layer.kv_heads * layer.open.head_bytes + kCacheLine);
  const Pages pages(layer, batch, staging, staging_first.data());
  append(layer, batch, rows, pages);
  attend(layer, batch, rows, pages);
  if (!again) flush(layer, batch, pages);
}

void Cpu::flush(const Layer& layer, const Batch& batch, const Pages& pages) {
  for (int s = 0; s < batch.sequences; ++s) {
    if (!pages.must_flush(s)) continue;
    for (int head = 0; head < layer.kv_heads; ++head) {
      std::memcpy(pages.tail(s, head), pages.open(s, pages.last_page(s), head),
                  static_cast<size_t>(layer.open.head_bytes));
    }
  }
}

}  // namespace kvbits
