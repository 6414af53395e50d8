// The decoder's kernels on rows, compiled for one instruction set; see isa/avx512.cpp for why all is anonymous.
#include <immintrin.h>

#include "../decoder/rows.h"
#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
// clang-format off: the order is the dependency
#include "../simd/avx512.h"
#include "../decoder/rows_kernels.h"
// clang-format on

const RowKernels kRows = {"avx512bf16", multiply_any, multiply_any, quantize_any, kCodeZero,
                          norm_any,     rotate_any,   gate_any,     round_any};
}  // namespace

const RowKernels& avx512bf16_rows() { return kRows; }
}  // namespace kvbits
