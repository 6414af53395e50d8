// Products with weights in bits, compiled for one instruction set; see isa/scalar.cpp for why all is anonymous.
#include <immintrin.h>

#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"
#include "../weights/formats.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "avx2";
// clang-format off: the order is the dependency
#include "../simd/avx2-inl.h"
#include "../weights/codes-inl.h"
#include "../weights/params-inl.h"
#include "../weights/product-inl.h"
// clang-format on
}  // namespace

const ProductKernels& avx2_products() { return kProducts; }
}  // namespace kvbits
