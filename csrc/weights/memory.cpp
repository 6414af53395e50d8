#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kvbits {

#ifdef __linux__
namespace {

constexpr size_t kHuge = 2 << 20, kChunk = 64 << 20, kLine = 64;

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

// Address space that becomes memory, huge page by huge page, when it is written. A page that was never small need not
// be copied into a huge one afterwards, and a layer of a small model, smaller than a huge page, shares one.
class Chunk {
 public:
  explicit Chunk(size_t least) : size_(round_up(least > kChunk ? least : kChunk, kHuge)) {
    map_ = mmap(nullptr, size_ + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    base_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(map_), kHuge));
    madvise(base_, size_, MADV_HUGEPAGE);  // without huge pages all works as well
  }
  ~Chunk() { munmap(map_, size_ + kHuge); }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  // Null: no room.
  uint8_t* take(size_t bytes) {
    if (bytes > size_ - used_) return nullptr;
    uint8_t* found = base_ + used_;
    used_ = round_up(used_ + bytes, kLine);
    return found;
  }

 private:
  const size_t size_;
  size_t used_ = 0;
  void* map_;
  uint8_t* base_;
};

}  // namespace

std::shared_ptr<uint8_t> weight_memory(size_t bytes) {
  static std::mutex lock;
  static std::weak_ptr<Chunk> newest;  // it goes with the last weight in it
  const std::lock_guard<std::mutex> held(lock);
  std::shared_ptr<Chunk> chunk = newest.lock();
  uint8_t* found = chunk == nullptr ? nullptr : chunk->take(bytes);
  if (found == nullptr) {
    chunk = std::make_shared<Chunk>(bytes);
    newest = chunk;
    found = chunk->take(bytes);
  }
  return std::shared_ptr<uint8_t>(chunk, found);
}
#else
std::shared_ptr<uint8_t> weight_memory(size_t bytes) {
  auto* found = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
  if (found == nullptr) throw std::bad_alloc();
  return std::shared_ptr<uint8_t>(found, std::free);
}
#endif

}  // namespace kvbits
