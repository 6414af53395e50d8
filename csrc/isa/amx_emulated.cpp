// The attention kernels on tiles that are emulated; see isa/scalar.cpp for why all is anonymous.
#include <immintrin.h>

#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "amx_emulated";
// clang-format off: the order is the dependency
#include "../simd/avx512-inl.h"
#include "../simd/tile_config-inl.h"
#include "../simd/amx_emulated-inl.h"
#include "../tiles/attention-inl.h"
// clang-format on
}  // namespace

const Kernels& amx_emulated_kernels() {
  static const Kernels kernels = kernels_on_tiles();
  return kernels;
}
}  // namespace kvbits
