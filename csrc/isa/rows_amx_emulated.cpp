// The decoder's kernels on rows where there are tiles that are emulated; see isa/scalar.cpp for why all is anonymous.
#include <immintrin.h>

#include "../decoder/rows.h"
#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "amx_emulated";
// clang-format off: the order is the dependency
#include "../simd/tile_config-inl.h"
#include "../simd/amx_emulated-inl.h"
#include "../decoder/tiles-inl.h"
// clang-format on
}  // namespace

const RowKernels& amx_emulated_rows() {
  static const RowKernels rows = rows_on_tiles();
  return rows;
}
}  // namespace kvbits
