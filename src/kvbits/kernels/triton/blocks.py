"""Values with a scale for each block of channels (:mod:`kvbits.codecs.blocks`): a small affine page a block."""

import triton
import triton.language as tl

from kvbits.kernels.triton.planes import load_codes


@triton.jit
def dequantize_blocks(page, FORMAT: tl.constexpr):
    """All blocks at once: each lane knows the small page that it lies in."""
    token = tl.arange(0, FORMAT.row_block)
    lane = tl.arange(0, FORMAT.lane_block)
    block = lane // FORMAT.stride * FORMAT.bytes
    inside = lane < FORMAT.lanes
    words = block // 4 + lane % FORMAT.stride
    codes = load_codes(
        page, 0, FORMAT.bits, FORMAT.rows, 0, FORMAT.stride, FORMAT.row_block, FORMAT.lane_block, words, inside
    )
    params = (page + FORMAT.params_at).to(tl.pointer_type(tl.float16)) + block[None, :] // 2 + token[:, None]
    scale = tl.load(params, mask=inside[None, :], other=0.0).to(tl.float32)
    zero = tl.load(params + FORMAT.rows, mask=inside[None, :], other=0.0).to(tl.float32)
    return codes.to(tl.float32) * scale + zero
