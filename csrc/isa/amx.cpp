// The attention kernels for AMX (tiles of bytes and of bfloat16); see isa/scalar.cpp for why all is anonymous.
#include <immintrin.h>

#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "amx";
// clang-format off: the order is the dependency
#include "../simd/avx512-inl.h"
#include "../simd/tile_config-inl.h"
#include "../simd/amx-inl.h"
#include "../tiles/attention-inl.h"
// clang-format on
}  // namespace

const Kernels& amx_kernels() {
  static const Kernels kernels = kernels_on_tiles();
  return kernels;
}
}  // namespace kvbits
