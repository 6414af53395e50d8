// The kernels compiled for one instruction set. All code is in an anonymous namespace, so that no other object can pick
// up a function that this file's compiler flags made.
#include <immintrin.h>

#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
constexpr char kIsa[] = "avx512";
// clang-format off: the order is the dependency
#include "../simd/avx512-inl.h"
#include "../attention-inl.h"
// clang-format on
}  // namespace

const Kernels& avx512_kernels() { return kKernels; }
}  // namespace kvbits
