// The kernels compiled for one instruction set. All code is in an anonymous namespace, so that no other object can pick
// up a function that this file's compiler flags made.
#include <immintrin.h>

#include "../kernels.h"
#include "../numbers.h"
#include "../unrolled.h"

namespace kvbits {
namespace {
#include "../simd/avx2.h"
// clang-format off: the order is the dependency
#include "../codecs/planes.h"
#include "../codecs/quantize.h"
#include "../codecs/raw.h"
#include "../codecs/forms.h"
#include "../codecs/codebook.h"
#include "../codecs/affine.h"
#include "../codecs/seal.h"
#include "../codecs/float8.h"
#include "../codecs/compose.h"
#include "../codecs/table.h"
#include "../softmax.h"
// clang-format on

const Kernels kKernels = {
    "avx2",     key_kernel, value_kernel, seal_key_kernel,  seal_value_kernel,  softmax_any,
    merge_rows, load_query, store_output, draft_key_kernel, draft_value_kernel,
};
}  // namespace

const Kernels& avx2_kernels() { return kKernels; }
}  // namespace kvbits
