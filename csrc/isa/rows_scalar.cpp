// The decoder's kernels on rows, compiled for one instruction set; see isa/scalar.cpp for why all is anonymous.
#include "../decoder/rows.h"
#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
// clang-format off: the order is the dependency
#include "../simd/scalar.h"
#include "../decoder/rows_kernels.h"
// clang-format on

const RowKernels kRows = {"scalar", multiply_any, multiply_any, quantize_any, kCodeZero,
                          norm_any, rotate_any,   gate_any,     round_any};
}  // namespace

const RowKernels& scalar_rows() { return kRows; }
}  // namespace kvbits
