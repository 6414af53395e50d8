"""16-bit pages (:mod:`kvbits.codecs.raw`): two rows of a lane are one 32-bit word."""

import triton
import triton.language as tl


@triton.jit
def dequantize_raw(page, FORM: tl.constexpr):
    """bfloat16 is the upper half of float32."""
    pair = tl.arange(0, FORM.row_block // 2)
    lane = tl.arange(0, FORM.lane_block)
    mask = (pair < FORM.rows // 2)[:, None] & (lane < FORM.lanes)[None, :]
    words = page.to(tl.pointer_type(tl.uint32)) + pair[:, None] * FORM.lanes + lane[None, :]
    word = tl.load(words, mask=mask, other=0)
    shift = (16 * tl.arange(0, 2)).to(tl.uint32)
    bits = (word[:, None, :] >> shift[None, :, None]) << 16
    return tl.reshape(bits, [FORM.row_block, FORM.lane_block]).to(tl.float32, bitcast=True)


@triton.jit
def quantize_raw(x, page, FORM: tl.constexpr):
    """``x`` is made of bfloat16 numbers: nothing is rounded."""
    half = x.to(tl.uint32, bitcast=True) >> 16
    shift = (16 * tl.arange(0, 2)).to(tl.uint32)
    parts = tl.reshape(half, [FORM.row_block // 2, 2, FORM.lane_block]) << shift[None, :, None]
    pair = tl.arange(0, FORM.row_block // 2)
    lane = tl.arange(0, FORM.lane_block)
    mask = (pair < FORM.rows // 2)[:, None] & (lane < FORM.lanes)[None, :]
    words = page.to(tl.pointer_type(tl.uint32)) + pair[:, None] * FORM.lanes + lane[None, :]
    tl.store(words, tl.sum(parts, axis=1).to(tl.uint32), mask=mask)
