// Products with weights in bits, compiled for one instruction set; see isa/scalar.cpp for why all is anonymous.
#include <immintrin.h>

#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"
#include "../weights/formats.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "avx512";
// clang-format off: the order is the dependency
#include "../simd/avx512-inl.h"
#include "../weights/codes-inl.h"
#include "../weights/params-inl.h"
#include "../weights/product-inl.h"
// clang-format on
}  // namespace

const ProductKernels& avx512_products() { return kProducts; }
}  // namespace kvbits
