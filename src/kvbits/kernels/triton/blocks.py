"""Values with a scale for each block of channels (:mod:`kvbits.codecs.blocks`): a small affine page a block."""

import triton
import triton.language as tl

from kvbits.kernels.triton.planes import load_codes


@triton.jit
def dequantize_blocks(page, FORM: tl.constexpr):
    """All blocks at once: each lane knows the small page that it lies in."""
    token = tl.arange(0, FORM.row_block)
    lane = tl.arange(0, FORM.lane_block)
    block = lane // FORM.stride * FORM.bytes
    inside = lane < FORM.lanes
    words = block // 4 + lane % FORM.stride
    codes = load_codes(page, 0, FORM.bits, FORM.rows, 0, FORM.stride, FORM.row_block, FORM.lane_block, words, inside)
    params = (page + FORM.params_at).to(tl.pointer_type(tl.float16)) + block[None, :] // 2 + token[:, None]
    scale = tl.load(params, mask=inside[None, :], other=0.0).to(tl.float32)
    zero = tl.load(params + FORM.rows, mask=inside[None, :], other=0.0).to(tl.float32)
    return codes.to(tl.float32) * scale + zero
