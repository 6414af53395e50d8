"""Codes in planes (:mod:`kvbits.codecs.packing`), read and written as 32-bit words: one word holds 4 rows of a lane
times the rows that share its bytes.
"""

import triton
import triton.language as tl

from kvbits.codecs.packing import PLANES


@triton.constexpr_function
def plane_width(bits: int, plane: int) -> int:
    """Bits of a code that its ``plane``-th plane holds, 0 where there is none."""
    widths = PLANES[bits]
    return widths[plane] if plane < len(widths) else 0


@triton.jit
def _shifts(WIDTH: tl.constexpr):
    """Where in its word each row of a group of ``32 / WIDTH`` rows lies."""
    row = tl.arange(0, 32 // WIDTH)
    return 8 * (row % 4) + WIDTH * (row // 4)


@triton.jit
def _words(page, AT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr, STRIDE: tl.constexpr,
           ROW_BLOCK: tl.constexpr, lane_words, lane_mask):  # fmt: skip
    """Addresses and mask of the words of a plane at byte ``AT`` whose first row is row ``SKIP`` of the block."""
    group = tl.arange(0, ROW_BLOCK * WIDTH // 32) - SKIP * WIDTH // 32
    addresses = (page + AT).to(tl.pointer_type(tl.uint32)) + group[:, None] * STRIDE + lane_words[None, :]
    mask = ((group >= 0) & (group < ROWS * WIDTH // 32))[:, None] & lane_mask[None, :]
    return addresses, mask


@triton.jit
def _load_plane(page, AT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr,
                STRIDE: tl.constexpr, ROW_BLOCK: tl.constexpr, LANE_BLOCK: tl.constexpr,
                lane_words, lane_mask):  # fmt: skip
    addresses, mask = _words(page, AT, WIDTH, ROWS, SKIP, STRIDE, ROW_BLOCK, lane_words, lane_mask)
    words = tl.load(addresses, mask=mask, other=0)
    parts = (words[:, None, :] >> _shifts(WIDTH).to(tl.uint32)[None, :, None]) & ((1 << WIDTH) - 1)
    return tl.reshape(parts, [ROW_BLOCK, LANE_BLOCK]).to(tl.int32)


@triton.jit
def load_codes(page, AT: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr,
               STRIDE: tl.constexpr, ROW_BLOCK: tl.constexpr, LANE_BLOCK: tl.constexpr,
               lane_words, lane_mask):  # fmt: skip
    """Codes ``int32 [ROW_BLOCK, LANE_BLOCK]``; ``ROWS`` rows from ``SKIP`` on are stored, the others are 0.

    ``page`` points to bytes; ``lane_words`` is each lane's word in a row of groups, which is ``STRIDE`` words long.
    """
    first: tl.constexpr = plane_width(BITS, 0)
    second: tl.constexpr = plane_width(BITS, 1)
    third: tl.constexpr = plane_width(BITS, 2)
    codes = _load_plane(page, AT, first, ROWS, SKIP, STRIDE, ROW_BLOCK, LANE_BLOCK, lane_words, lane_mask)
    if second > 0:
        at: tl.constexpr = AT + ROWS * STRIDE * first // 8
        rest = _load_plane(page, at, second, ROWS, SKIP, STRIDE, ROW_BLOCK, LANE_BLOCK, lane_words, lane_mask)
        codes = codes | (rest << first)
    if third > 0:
        both: tl.constexpr = first + second
        end: tl.constexpr = AT + ROWS * STRIDE * both // 8
        rest = _load_plane(page, end, third, ROWS, SKIP, STRIDE, ROW_BLOCK, LANE_BLOCK, lane_words, lane_mask)
        codes = codes | (rest << both)
    return codes


@triton.jit
def _store_plane(page, codes, AT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr,
                 STRIDE: tl.constexpr, ROW_BLOCK: tl.constexpr, LANE_BLOCK: tl.constexpr,
                 lane_words, lane_mask):  # fmt: skip
    addresses, mask = _words(page, AT, WIDTH, ROWS, SKIP, STRIDE, ROW_BLOCK, lane_words, lane_mask)
    parts = tl.reshape(codes & ((1 << WIDTH) - 1), [ROW_BLOCK * WIDTH // 32, 32 // WIDTH, LANE_BLOCK])
    words = tl.sum(parts.to(tl.uint32) << _shifts(WIDTH).to(tl.uint32)[None, :, None], axis=1)
    tl.store(addresses, words.to(tl.uint32), mask=mask)


@triton.jit
def store_codes(page, codes, AT: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, SKIP: tl.constexpr,
                STRIDE: tl.constexpr, ROW_BLOCK: tl.constexpr, LANE_BLOCK: tl.constexpr,
                lane_words, lane_mask):  # fmt: skip
    """Undo :func:`load_codes`; bits above ``BITS`` are ignored."""
    first: tl.constexpr = plane_width(BITS, 0)
    second: tl.constexpr = plane_width(BITS, 1)
    third: tl.constexpr = plane_width(BITS, 2)
    _store_plane(page, codes, AT, first, ROWS, SKIP, STRIDE, ROW_BLOCK, LANE_BLOCK, lane_words, lane_mask)
    if second > 0:
        at: tl.constexpr = AT + ROWS * STRIDE * first // 8
        _store_plane(page, codes >> first, at, second, ROWS, SKIP, STRIDE, ROW_BLOCK, LANE_BLOCK, lane_words, lane_mask)
    if third > 0:
        both: tl.constexpr = first + second
        end: tl.constexpr = AT + ROWS * STRIDE * both // 8
        _store_plane(page, codes >> both, end, third, ROWS, SKIP, STRIDE, ROW_BLOCK, LANE_BLOCK, lane_words, lane_mask)


@triton.jit
def load_matrix(page, AT: tl.constexpr, BITS: tl.constexpr, FORMAT: tl.constexpr):
    """The codes of a page whose lanes lie side by side."""
    lane = tl.arange(0, FORMAT.lane_block)
    return load_codes(
        page, AT, BITS, FORMAT.rows, 0, FORMAT.lanes, FORMAT.row_block, FORMAT.lane_block, lane, lane < FORMAT.lanes
    )


@triton.jit
def store_matrix(page, codes, AT: tl.constexpr, BITS: tl.constexpr, FORMAT: tl.constexpr):
    """Undo :func:`load_matrix`."""
    lane = tl.arange(0, FORMAT.lane_block)
    store_codes(
        page,
        codes,
        AT,
        BITS,
        FORMAT.rows,
        0,
        FORMAT.lanes,
        FORMAT.row_block,
        FORMAT.lane_block,
        lane,
        lane < FORMAT.lanes,
    )


@triton.jit
def fill_zero(page, START: tl.constexpr, END: tl.constexpr):
    """The padding of a page: fewer than 64 bytes."""
    byte = tl.arange(0, 64)
    tl.store(page + START + byte, tl.zeros([64], tl.uint8), mask=byte < END - START)
