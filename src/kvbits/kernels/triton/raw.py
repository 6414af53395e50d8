"""16-bit pages (:mod:`kvbits.codecs.raw`): two rows of a lane are one 32-bit word."""

import triton
import triton.language as tl


@triton.jit
def dequantize_raw(page, FORMAT: tl.constexpr):
    """bfloat16 is the upper half of float32."""
    pair = tl.arange(0, FORMAT.row_block // 2)
    lane = tl.arange(0, FORMAT.lane_block)
    mask = (pair < FORMAT.rows // 2)[:, None] & (lane < FORMAT.lanes)[None, :]
    words = page.to(tl.pointer_type(tl.uint32)) + pair[:, None] * FORMAT.lanes + lane[None, :]
    word = tl.load(words, mask=mask, other=0)
    shift = (16 * tl.arange(0, 2)).to(tl.uint32)
    bits = (word[:, None, :] >> shift[None, :, None]) << 16
    return tl.reshape(bits, [FORMAT.row_block, FORMAT.lane_block]).to(tl.float32, bitcast=True)


@triton.jit
def quantize_raw(x, page, FORMAT: tl.constexpr):
    """``x`` is made of bfloat16 numbers: nothing is rounded."""
    half = x.to(tl.uint32, bitcast=True) >> 16
    shift = (16 * tl.arange(0, 2)).to(tl.uint32)
    parts = tl.reshape(half, [FORMAT.row_block // 2, 2, FORMAT.lane_block]) << shift[None, :, None]
    pair = tl.arange(0, FORMAT.row_block // 2)
    lane = tl.arange(0, FORMAT.lane_block)
    mask = (pair < FORMAT.rows // 2)[:, None] & (lane < FORMAT.lanes)[None, :]
    words = page.to(tl.pointer_type(tl.uint32)) + pair[:, None] * FORMAT.lanes + lane[None, :]
    tl.store(words, tl.sum(parts, axis=1).to(tl.uint32), mask=mask)
