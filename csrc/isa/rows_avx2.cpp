// The decoder's kernels on rows, compiled for one instruction set; see isa/scalar.cpp for why all is anonymous.
#include <immintrin.h>

#include "../decoder/rows.h"
#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "avx2";
// clang-format off: the order is the dependency
#include "../simd/avx2-inl.h"
#include "../decoder/rows-inl.h"
// clang-format on
}  // namespace

const RowKernels& avx2_rows() { return kRows; }
}  // namespace kvbits
