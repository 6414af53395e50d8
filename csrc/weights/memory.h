// Where weights lie: side by side on huge pages, which a decode step's one reading of all of them needs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace kvbits {

// `bytes` on a cache line, not yet written. Throws std::bad_alloc.
std::shared_ptr<uint8_t> weight_memory(size_t bytes);

}  // namespace kvbits
