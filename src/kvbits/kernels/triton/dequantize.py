"""What a sealed page means: the one place where attention meets the codecs."""

import triton
import triton.language as tl

from kvbits.kernels.triton.affine import dequantize_affine, dequantize_nibbles
from kvbits.kernels.triton.blocks import dequantize_blocks
from kvbits.kernels.triton.codebook import dequantize_codebook
from kvbits.kernels.triton.float8 import dequantize_float8
from kvbits.kernels.triton.mixed import dequantize_mixed
from kvbits.kernels.triton.raw import dequantize_raw


@triton.jit
def dequantize(page, FORMAT: tl.constexpr):
    """``float32 [row_block, lane_block]`` from the bytes at ``page``: keys ``[dim, 64]``, values ``[64, dim]``.

    Codebook pages come rotated and without their centers, mixed ones in the page's own order of channels.
    """
    if FORMAT.kind == "raw":
        return dequantize_raw(page, FORMAT)
    elif FORMAT.kind == "affine":
        return dequantize_affine(page, FORMAT)
    elif FORMAT.kind == "nibbles":
        return dequantize_nibbles(page, FORMAT)
    elif FORMAT.kind == "float8":
        return dequantize_float8(page, FORMAT)
    elif FORMAT.kind == "codebook":
        return dequantize_codebook(page, FORMAT)
    elif FORMAT.kind == "mixed":
        return dequantize_mixed(page, FORMAT)
    else:
        tl.static_assert(FORMAT.kind == "blocks")
        return dequantize_blocks(page, FORMAT)
