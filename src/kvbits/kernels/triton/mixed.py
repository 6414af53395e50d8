"""Key channels of two widths (:mod:`kvbits.codecs.mixed`)."""

import triton
import triton.language as tl

from kvbits.kernels.triton.numbers import broken_half, clamp, numbers_of, reciprocal, rint, to_half
from kvbits.kernels.triton.planes import fill_zero, load_codes, store_codes


@triton.jit
def stored_channels(page, FORMAT: tl.constexpr):
    """Which channel each row of a page is, ``int32 [dim_block]``."""
    row = tl.arange(0, FORMAT.dim_block)
    return tl.load(page + row, mask=row < FORMAT.dim, other=0).to(tl.int32)


@triton.jit
def _part(page, AT: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr, FORMAT: tl.constexpr):
    """Elements ``float32 [row_block, 64]`` of the rows from ``SKIP`` on that are coded in ``BITS`` bits."""
    lane = tl.arange(0, FORMAT.lane_block)
    codes = load_codes(page, AT, BITS, ROWS, SKIP, FORMAT.lanes, FORMAT.row_block, FORMAT.lane_block, lane, lane >= 0)
    row = tl.arange(0, FORMAT.row_block) - SKIP
    inside = (row >= 0) & (row < ROWS)
    params = (page + AT + ROWS * FORMAT.lanes * BITS // 8).to(tl.pointer_type(tl.float16))
    scale = tl.load(params + row, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(params + ROWS + row, mask=inside, other=0.0).to(tl.float32)
    return codes.to(tl.float32) * scale[:, None] + zero[:, None]


@triton.jit
def dequantize_mixed(page, FORMAT: tl.constexpr):
    """Rows in the page's own order of channels (:func:`stored_channels`)."""
    wide = _part(page, FORMAT.first_at, FORMAT.bits, FORMAT.first, 0, FORMAT)
    # rows of the other part are 0 in each
    return wide + _part(page, FORMAT.second_at, FORMAT.low_bits, FORMAT.dim - FORMAT.first, FORMAT.first, FORMAT)


@triton.jit
def by_reach(x, FORMAT: tl.constexpr):
    """Channels of ``x`` ``float32 [dim_block, 64]`` by falling range, the lower one of equals first: ``int32``."""
    row = tl.arange(0, FORMAT.dim_block)
    x, _ = numbers_of(x, 1)
    reach = tl.where(row < FORMAT.dim, tl.max(x, 1) - tl.min(x, 1), -1.0)
    larger = reach[:, None] > reach[None, :]
    before = (reach[:, None] == reach[None, :]) & (row[:, None] < row[None, :])
    place = tl.sum((larger | before).to(tl.int32), 0)
    return tl.sum(tl.where(place[:, None] == row[None, :], row[:, None], 0), 0)


@triton.jit
def _store_part(page, codes, scale, zero, AT: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
                SKIP: tl.constexpr, END: tl.constexpr, FORMAT: tl.constexpr):  # fmt: skip
    lane = tl.arange(0, FORMAT.lane_block)
    store_codes(page, codes, AT, BITS, ROWS, SKIP, FORMAT.lanes, FORMAT.row_block, FORMAT.lane_block, lane, lane >= 0)
    row = tl.arange(0, FORMAT.row_block) - SKIP
    inside = (row >= 0) & (row < ROWS)
    at: tl.constexpr = AT + ROWS * FORMAT.lanes * BITS // 8
    params = (page + at).to(tl.pointer_type(tl.float16))
    tl.store(params + row, scale, mask=inside)
    tl.store(params + ROWS + row, zero, mask=inside)
    fill_zero(page, at + 4 * ROWS, END)


@triton.jit
def quantize_mixed(x, channels, page, FORMAT: tl.constexpr):
    """``x``: rows in the order of ``channels``."""
    row = tl.arange(0, FORMAT.dim_block)
    tl.store(page + row, channels.to(tl.uint8), mask=row < FORMAT.dim)
    fill_zero(page, FORMAT.dim, FORMAT.first_at)
    x, broken = numbers_of(x, 1)
    top = tl.where(row < FORMAT.first, (1 << FORMAT.bits) - 1.0, (1 << FORMAT.low_bits) - 1.0)
    zero = to_half(tl.min(x, 1))
    low = zero.to(tl.float32)
    scale = to_half(tl.math.div_rn(tl.maximum(tl.max(x, 1) - low, 0.0), top))
    inverse = reciprocal(scale.to(tl.float32))
    codes = rint(clamp((x - low[:, None]) * inverse[:, None], 0.0, top[:, None])).to(tl.int32)
    scale = broken_half(scale, broken)
    first: tl.constexpr = FORMAT.first
    _store_part(page, codes, scale, zero, FORMAT.first_at, FORMAT.bits, first, 0, FORMAT.second_at, FORMAT)
    _store_part(
        page, codes, scale, zero, FORMAT.second_at, FORMAT.low_bits, FORMAT.dim - first, first, FORMAT.bytes, FORMAT
    )
