"""Affine codes, with float16 parameters (``affine``) or in two planes of nibbles with one-byte scales (``nibbles``)."""

import triton
import triton.language as tl

from kvbits.codecs.scale8 import NAN
from kvbits.kernels.triton.choose import choose
from kvbits.kernels.triton.numbers import broken_half, from_scale8, numbers_of, reciprocal, to_half, to_scale8
from kvbits.kernels.triton.planes import fill_zero, load_matrix, store_matrix

_NAN = tl.constexpr(NAN)


@triton.jit
def _param_index(FORMAT: tl.constexpr):
    if FORMAT.per_row:
        index = tl.arange(0, FORMAT.row_block)
        return index, index < FORMAT.rows
    else:
        index = tl.arange(0, FORMAT.lane_block)
        return index, index < FORMAT.lanes


@triton.jit
def _apply(codes, scale, zero, FORMAT: tl.constexpr):
    if FORMAT.per_row:
        return codes * scale[:, None] + zero[:, None]
    else:
        return codes * scale[None, :] + zero[None, :]


@triton.jit
def dequantize_affine(page, FORMAT: tl.constexpr):
    """Codes times their scales, plus their zeros."""
    codes = load_matrix(page, 0, FORMAT.bits, FORMAT)
    index, inside = _param_index(FORMAT)
    count: tl.constexpr = FORMAT.rows if FORMAT.per_row else FORMAT.lanes
    params = (page + FORMAT.params_at).to(tl.pointer_type(tl.float16))
    scale = tl.load(params + index, mask=inside, other=0.0).to(tl.float32)
    half: tl.constexpr = 1 << (FORMAT.bits - 1)
    if FORMAT.symmetric:
        # keys are stored with an offset, values in two's complement
        codes = (codes if FORMAT.key else codes ^ half) - half
        zero = tl.zeros(scale.shape, tl.float32)
    else:
        zero = tl.load(params + count + index, mask=inside, other=0.0).to(tl.float32)
    return _apply(codes.to(tl.float32), scale, zero, FORMAT)


@triton.jit
def dequantize_nibbles(page, FORMAT: tl.constexpr):
    """Both planes, or what a draft makes of the high one."""
    high = load_matrix(page, 0, 4, FORMAT)
    index, inside = _param_index(FORMAT)
    count: tl.constexpr = FORMAT.rows if FORMAT.per_row else FORMAT.lanes
    scale = from_scale8(tl.load(page + FORMAT.params_at + index, mask=inside, other=0))
    if FORMAT.symmetric:
        zero = -128.0 * scale
    else:
        zeros = (page + FORMAT.params_at + count).to(tl.pointer_type(tl.float16))
        zero = tl.load(zeros + index, mask=inside, other=0.0).to(tl.float32)
    if FORMAT.draft:
        return _apply(high.to(tl.float32), 16.0 * scale, zero + 7.5 * scale, FORMAT)
    else:
        low = load_matrix(page, FORMAT.second_at, 4, FORMAT)
        return _apply((16 * high + low).to(tl.float32), scale, zero, FORMAT)


@triton.jit
def extent(x, clip, FORMAT: tl.constexpr):
    """Least and largest of every group of ``x``, moved towards their middle where there is a ``clip``."""
    axis: tl.constexpr = 1 if FORMAT.per_row else 0
    if FORMAT.per_row:
        inside = (tl.arange(0, FORMAT.lane_block) < FORMAT.lanes)[None, :]
    else:
        inside = (tl.arange(0, FORMAT.row_block) < FORMAT.rows)[:, None]
    low = tl.min(tl.where(inside, x, float("inf")), axis)
    high = tl.max(tl.where(inside, x, float("-inf")), axis)
    if clip is not None:
        share = tl.load(clip)
        middle = (low + high) * 0.5
        reach = (high - low) * 0.5 * share
        low = tl.where(share == 1.0, low, middle - reach)
        high = tl.where(share == 1.0, high, middle + reach)
    return low, high


@triton.jit
def quantize_affine(x, page, clip, feedback, order, rank, FORMAT: tl.constexpr):
    """``affine`` and ``nibbles`` pages from ``x`` ``float32 [row_block, lane_block]``."""
    index, inside = _param_index(FORMAT)
    count: tl.constexpr = FORMAT.rows if FORMAT.per_row else FORMAT.lanes
    nibbles: tl.constexpr = FORMAT.kind == "nibbles"
    half: tl.constexpr = 1 << (FORMAT.bits - 1)
    x, broken = numbers_of(x, 1 if FORMAT.per_row else 0)
    if FORMAT.symmetric:
        zero = tl.full([FORMAT.row_block if FORMAT.per_row else FORMAT.lane_block], 0.0, tl.float32)
        reach = tl.math.div_rn(tl.max(tl.abs(x), 1 if FORMAT.per_row else 0), half - 1.0)
    else:
        low, high = extent(x, clip, FORMAT)
        zero = to_half(low).to(tl.float32)
        # a saturated least may be the larger
        reach = tl.math.div_rn(tl.maximum(high - zero, 0.0), 2.0 * half - 1.0)
    if nibbles:
        byte = to_scale8(reach, True)
        scale = from_scale8(byte)
        tl.store(page + FORMAT.params_at + index, tl.where(broken, _NAN, byte).to(tl.uint8), mask=inside)
    else:
        stored = to_half(reach)
        scale = stored.to(tl.float32)
        target = (page + FORMAT.params_at).to(tl.pointer_type(tl.float16))
        tl.store(target + index, broken_half(stored, broken), mask=inside)
    at: tl.constexpr = FORMAT.params_at + (1 if nibbles else 2) * count
    if not FORMAT.symmetric:
        tl.store((page + at).to(tl.pointer_type(tl.float16)) + index, to_half(zero), mask=inside)
    end: tl.constexpr = at + (0 if FORMAT.symmetric else 2 * count)
    least: tl.constexpr = 1.0 - half if FORMAT.symmetric else 0.0
    most: tl.constexpr = half - 1.0 if FORMAT.symmetric else 2.0 * half - 1.0
    codes = choose(x, scale, zero, reciprocal(scale), least, most, feedback, order, rank, FORMAT).to(tl.int32)
    if nibbles:
        codes += half if FORMAT.symmetric else 0
        plane: tl.constexpr = FORMAT.rows * FORMAT.lanes // 2
        store_matrix(page, codes >> 4, 0, 4, FORMAT)
        fill_zero(page, end, FORMAT.second_at)
        store_matrix(page, codes, FORMAT.second_at, 4, FORMAT)
        fill_zero(page, FORMAT.second_at + plane, FORMAT.bytes)
    else:
        codes += half if FORMAT.symmetric and FORMAT.key else 0
        store_matrix(page, codes, 0, FORMAT.bits, FORMAT)
        fill_zero(page, end, FORMAT.bytes)
