// The decoder's kernels on rows, compiled for one instruction set; see isa/scalar.cpp for why all is anonymous.
#include <immintrin.h>

#include "../decoder/rows.h"
#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "avx512bf16";
// clang-format off: the order is the dependency
#include "../simd/avx512-inl.h"
#include "../decoder/rows-inl.h"
// clang-format on
}  // namespace

const RowKernels& avx512bf16_rows() { return kRows; }
}  // namespace kvbits
