// The attention kernels of one instruction set: included inside isa/*.cpp's anonymous namespace, after one of simd/ and
// `kIsa`, its name. The fragments are no headers of their own: each uses those before it.
// clang-format off: the order is the dependency
#include "codecs/planes-inl.h"
#include "codecs/quantize-inl.h"
#include "codecs/raw-inl.h"
#include "codecs/formats-inl.h"
#include "codecs/codebook-inl.h"
#include "codecs/affine-inl.h"
#include "codecs/seal-inl.h"
#include "codecs/open-inl.h"
#include "codecs/float8-inl.h"
#include "codecs/latent-inl.h"
#include "codecs/compose-inl.h"
#include "codecs/rows-inl.h"
#include "codecs/table-inl.h"
#include "softmax-inl.h"
// clang-format on

const Kernels kKernels = {
    kIsa,
    codec_sides,
    key_kernel,
    value_kernel,
    seal_key_kernel,
    seal_value_kernel,
    softmax_any,
    merge_rows,
    load_query,
    store_output,
    draft_key_kernel,
    draft_value_kernel,
    open_key_kernel,
    open_value_kernel,
    latent_kernel,
};
