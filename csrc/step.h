// One layer of one engine step: append, seal, attend, flush. Independent of the instruction set.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>

#include "kernels.h"
#include "workers.h"

namespace kvbits {

// A block of memory, aligned to the cache line, that only grows.
class Scratch {
 public:
  uint8_t* get(size_t bytes);

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

// Where the pages of one step lie in memory.
class Pages {
 public:
  // `staging` receives the 16-bit rows of pages that the step begins and that have no frames of their own.
  Pages(const Layer& layer, const Batch& batch, uint8_t* staging, const int32_t* staging_first)
      : layer_(layer), batch_(batch), staging_(staging), staging_first_(staging_first) {}

  // Head `head` of the sealed page `page` of sequence `s`: its keys, at value_offset its values.
  uint8_t* sealed(int s, int page, int head) const {
    if (is_sink(page)) {
      return at(layer_.sink, batch_.sink[static_cast<size_t>(s) * batch_.sink_frames + layer_.sink.frame], head);
    }
    // A sealed page has one frame for each group of layers; the tables of one group lie after those of another.
    const size_t row = static_cast<size_t>(layer_.sealed.frame) * batch_.sequences + s;
    const int32_t frame = batch_.sealed[row * batch_.max_pages + page];
    return at(layer_.sealed, frame, head);
  }
  // A sequence's first page may be sealed in a format of its own.
  bool is_sink(int page) const { return page == 0 && layer_.has_sink; }
  const Place& sealed_place(int page) const { return is_sink(page) ? layer_.sink : layer_.sealed; }
  // The 16-bit format of a page that the step touches.
  uint8_t* open(int s, int page, int head) const;
  // Where the page with the next token ends up.
  uint8_t* tail(int s, int head) const { return in_open_frames(batch_.tail, s, head); }

  int first_page(int s) const { return batch_.starts[s] / kPage; }
  int last_page(int s) const { return (batch_.starts[s] + batch_.counts[s] - 1) / kPage; }
  // The last page is partial and its rows lie in the staging area, not yet in its frames.
  bool must_flush(int s) const;
  // Staged pages of a sequence: every page after the first that has no frames in 16 bit.
  int staged(int s) const;

 private:
  uint8_t* at(const Place& place, int32_t frame, int head) const {
    return layer_.buffer + frame * layer_.frame_bytes + place.offset + head * place.head_bytes;
  }
  uint8_t* in_open_frames(const int32_t* table, int s, int head) const {
    return at(layer_.open, table[static_cast<size_t>(s) * batch_.open_frames + layer_.open.frame], head);
  }
  bool ends_inside_page(int s) const { return (batch_.starts[s] + batch_.counts[s]) % kPage != 0; }
  bool own_tail(int s) const {
    const size_t i = static_cast<size_t>(s) * batch_.open_frames;
    return batch_.tail[i] != batch_.head[i];
  }

  const Layer& layer_;
  const Batch& batch_;
  uint8_t* staging_;
  const int32_t* staging_first_;
};

class Cpu {
 public:
  Cpu(const Kernels& kernels, int threads, Workers::GompParallel gomp) : kernels_(kernels), workers_(threads, gomp) {}

  const Kernels& kernels() const { return kernels_; }
  int threads() const { return workers_.threads(); }
  Workers& workers() { return workers_; }

  // Returns null, or what is wrong with the layer's codecs.
  const char* supports(const Layer& layer) const;
  // One call at a time; another thread's waits. `again`: the same keys and values come once more in this step, and the
  // open page stays as it was (BatchLayout.again).
  void forward(const Layer& layer, const Batch& batch, const Rows& rows, bool again = false);

 private:
  void append(const Layer& layer, const Batch& batch, const Rows& rows, const Pages& pages);
  void attend(const Layer& layer, const Batch& batch, const Rows& rows, const Pages& pages);
  void flush(const Layer& layer, const Batch& batch, const Pages& pages);

  const Kernels& kernels_;
  Workers workers_;
  std::mutex mutex_;
  Scratch staging_, partials_, thread_scratch_;
};

}  // namespace kvbits
