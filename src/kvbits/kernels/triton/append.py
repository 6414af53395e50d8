"""New rows go to the 16-bit open page; after attention, which still reads what the open page held before."""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.triton.own import open_index

_TOKENS = tl.constexpr(PAGE_TOKENS)


@triton.jit
def _append(rows, target, page, start, count, first_row, head, FORMAT: tl.constexpr):
    channel, token = tl.arange(0, FORMAT.dim_block), tl.arange(0, _TOKENS)
    if FORMAT.key:  # side by side as they lie in the page: an empty page's zeros are most of what is stored
        channel, token = channel[:, None], token[None, :]
    else:
        channel, token = channel[None, :], token[:, None]
    position = page * _TOKENS + token
    new = (position >= start) & (position < start + count)
    row = (first_row + position - start).to(tl.int64)
    x = tl.load(rows[0] + row * rows[1] + head * rows[2] + channel, mask=new & (channel < FORMAT.dim), other=0.0)
    # a fresh page's rows to come are 0: a weight of 0 must not meet what an earlier owner left there
    mask = (new | (position - token >= start)) & (channel < FORMAT.dim)
    tl.store(target.to(tl.pointer_type(tl.bfloat16)) + open_index(channel, token, FORMAT.key, FORMAT.dim), x, mask=mask)


@triton.jit
def append_rows(key, value, cache, starts, counts, first_rows, head_frames, tail_frames, OPEN: tl.constexpr):
    """Grid ``(sequences, kv_heads, 4)``: keys and values of the page that stays open (``tail``), and of the one that
    the step began in.

    ``key``, ``value``: (pointer, stride of a row, stride of a head), ``bfloat16``. ``cache``: (bytes, bytes of a frame,
    the open page's byte in it). The page that the step began in, full when it ends, is kept in 16 bit only where it has
    frames of its own, ``head`` (a step that may be taken back).
    """
    KEYS: tl.constexpr = OPEN.keys
    VALUES: tl.constexpr = OPEN.values
    sequence, head, which = tl.program_id(0), tl.program_id(1), tl.program_id(2) // 2
    start, count = tl.load(starts + sequence), tl.load(counts + sequence)
    first_row = tl.load(first_rows + sequence)
    began = tl.load(head_frames + sequence)
    stays = tl.load(tail_frames + sequence)
    if (count > 0) & ((which == 0) | (began != stays)):
        page = tl.where(which == 0, (start + count) // _TOKENS, start // _TOKENS)
        frame = tl.where(which == 0, stays, began).to(tl.int64)
        target = cache[0] + frame * cache[1] + cache[2] + head * OPEN.bytes
        if tl.program_id(2) % 2 == 0:
            _append(key, target, page, start, count, first_row, head, KEYS)
        else:
            _append(value, target + OPEN.values_at, page, start, count, first_row, head, VALUES)
