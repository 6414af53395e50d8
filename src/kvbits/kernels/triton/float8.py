"""Pages of 8-bit floats with one scale (:mod:`kvbits.codecs.float8`), by bits: the formats of devices differ."""

import triton
import triton.language as tl

from kvbits.kernels.triton.numbers import clamp, from_float8, numbers_of, to_float8
from kvbits.kernels.triton.planes import fill_zero, load_matrix, store_matrix


@triton.jit
def dequantize_float8(page, FORMAT: tl.constexpr):
    """Floats times the page's scale."""
    scale = tl.load((page + FORMAT.params_at).to(tl.pointer_type(tl.float32)))
    return from_float8(load_matrix(page, 0, 8, FORMAT), FORMAT.bits) * scale


@triton.jit
def quantize_float8(x, page, FORMAT: tl.constexpr):
    """The largest element becomes the largest float."""
    largest: tl.constexpr = 448.0 if FORMAT.bits == 3 else 57344.0
    x, broken = numbers_of(x, 1)
    scale = tl.math.div_rn(tl.max(tl.max(tl.abs(x), 1), 0), largest)
    # 2**-126: the reciprocal of less would overflow
    usable = scale > 1.1754943508222875e-38
    inverse = tl.where(usable, tl.math.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    store_matrix(page, to_float8(clamp(x * inverse, -largest, largest), FORMAT.bits), 0, 8, FORMAT)
    broken = tl.max(broken.to(tl.int32), 0) > 0
    tl.store((page + FORMAT.params_at).to(tl.pointer_type(tl.float32)), tl.where(broken, float("nan"), scale))
    fill_zero(page, FORMAT.params_at + 4, FORMAT.bytes)
