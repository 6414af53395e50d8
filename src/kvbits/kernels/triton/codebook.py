"""Codebook codes of rotated heads (:mod:`kvbits.codecs.codebook`)."""

import triton
import triton.language as tl

from kvbits.codecs.codebook import REACH, ROTATED_MOST
from kvbits.codecs.scale8 import NAN
from kvbits.config import PAGE_TOKENS
from kvbits.kernels.triton.choose import choose, entry
from kvbits.kernels.triton.hadamard import rotate
from kvbits.kernels.triton.numbers import clamp, from_scale8, numbers_of, reciprocal, to_half, to_scale8
from kvbits.kernels.triton.planes import fill_zero, load_matrix, store_matrix

_TOKENS = tl.constexpr(PAGE_TOKENS)
_ROTATED_MOST = tl.constexpr(ROTATED_MOST)
_NAN = tl.constexpr(NAN)


@triton.constexpr_function
def _reach(bits: int) -> float:
    return float(REACH[bits])


@triton.jit
def dequantize_codebook(page, FORMAT: tl.constexpr):
    """Rotated elements, without the centers of :func:`centers`: the query and the result are rotated instead."""
    values = entry(load_matrix(page, 0, FORMAT.bits, FORMAT), FORMAT.bits)
    scale = from_scale8(tl.load(page + FORMAT.params_at + tl.arange(0, _TOKENS)))
    return values * (scale[None, :] if FORMAT.key else scale[:, None])


@triton.jit
def centers(page, FORMAT: tl.constexpr):
    """What every channel of a centered page lost before it was rotated, ``float32 [dim_block]``."""
    channel = tl.arange(0, FORMAT.dim_block)
    stored = (page + FORMAT.params_at + _TOKENS).to(tl.pointer_type(tl.float16))
    return tl.load(stored + channel, mask=channel < FORMAT.dim, other=0.0).to(tl.float32)


@triton.jit
def quantize_codebook(x, page, clip, feedback, order, rank, FORMAT: tl.constexpr):
    """``x`` ``float32 [row_block, lane_block]``, 0 for channels that are none."""
    token_axis: tl.constexpr = 1 if FORMAT.key else 0
    end: tl.constexpr = FORMAT.params_at + _TOKENS + (2 * FORMAT.dim if FORMAT.centered else 0)
    x, broken = numbers_of(x, 1 - token_axis)
    if FORMAT.centered:
        channel = tl.arange(0, FORMAT.dim_block)
        center = to_half((tl.min(x, token_axis) + tl.max(x, token_axis)) * 0.5)
        stored = (page + FORMAT.params_at + _TOKENS).to(tl.pointer_type(tl.float16))
        tl.store(stored + channel, center, mask=channel < FORMAT.dim)
        x = x - tl.expand_dims(center.to(tl.float32), token_axis)
    x = rotate(clamp(x, -_ROTATED_MOST, _ROTATED_MOST), FORMAT.key, FORMAT.rotate, FORMAT.rotate_steps)
    most = tl.max(tl.abs(x), 1 - token_axis)
    if clip is not None:
        most = most * tl.load(clip)
    byte = to_scale8(tl.math.div_rn(most, _reach(FORMAT.bits)), False)
    tl.store(page + FORMAT.params_at + tl.arange(0, _TOKENS), tl.where(broken, _NAN, byte).to(tl.uint8))
    scale = from_scale8(byte)
    zero = tl.zeros([_TOKENS], tl.float32)
    codes = choose(x, scale, zero, reciprocal(scale), 0.0, 0.0, feedback, order, rank, FORMAT)
    store_matrix(page, codes.to(tl.int32), 0, FORMAT.bits, FORMAT)
    fill_zero(page, end, FORMAT.bytes)
