// Products on tiles that are emulated; see isa/scalar.cpp for why all is anonymous.
#include <immintrin.h>

#include "../decoder/rows.h"
#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"
#include "../weights/formats.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "avx512";
constexpr char kTileIsa[] = "amx_emulated";
// clang-format off: the order is the dependency
#include "../simd/avx512-inl.h"
#include "../simd/tile_config-inl.h"
#include "../simd/amx_emulated-inl.h"
#include "../weights/codes-inl.h"
#include "../weights/params-inl.h"
#include "../weights/product-inl.h"
#include "../weights/tiles-inl.h"
#include "../weights/tiles-bf16-inl.h"
// clang-format on
}  // namespace

const ProductKernels& amx_emulated_products() { return kTileProducts; }

const RowKernels& amx_emulated_rows() {
  static const RowKernels rows = rows_on_tiles();
  return rows;
}
}  // namespace kvbits
