"""New rows go to the 16-bit open page; after attention, which still reads what the open page held before."""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.triton.own import open_index

_TOKENS = tl.constexpr(PAGE_TOKENS)


@triton.jit
def append_rows(rows, cache, row_sequence, starts, counts, first_rows, head_frames, tail_frames, KEY: tl.constexpr,
                DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Grid ``(rows, kv_heads)``: row by row into the page that stays open, ``tail``.

    ``rows``: (pointer, stride of a row, stride of a head), ``bfloat16``. ``cache``: (bytes, bytes of a frame, the open
    page's byte in it, bytes of a head, this side's byte in the head). Rows of a page that is full when the step ends
    are kept as well where that page has frames of its own, ``head`` (a step that may be taken back).
    """
    row, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(row_sequence + row)
    start, count = tl.load(starts + sequence), tl.load(counts + sequence)
    position = start + row - tl.load(first_rows + sequence)
    page = position // _TOKENS
    old = tl.load(head_frames + sequence)
    frame = tl.load(tail_frames + sequence)
    stays = page == (start + count) // _TOKENS
    twice = (old != frame) & (page == start // _TOKENS)
    if stays | twice:
        place = tl.where(twice, old, frame).to(tl.int64)
        channel = tl.arange(0, BLOCK)
        inside = channel < DIM
        x = tl.load(rows[0] + row.to(tl.int64) * rows[1] + head * rows[2] + channel, mask=inside, other=0.0)
        target = cache[0] + place * cache[1] + cache[2] + head * cache[3] + cache[4]
        index = open_index(channel, position % _TOKENS, KEY, DIM)
        tl.store(target.to(tl.pointer_type(tl.bfloat16)) + index, x, mask=inside)
