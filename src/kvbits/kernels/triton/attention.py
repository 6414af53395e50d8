"""The attention kernels: decode in splits of pages that are merged, prefill tile by tile."""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.base import SPLIT_PAGES
from kvbits.kernels.triton.decode import attend_few, attend_pages
from kvbits.kernels.triton.softmax import finish
from kvbits.kernels.triton.tile import attend_own, attend_sealed, load_query, oldest_page, store_result, tile_rows

_TOKENS = tl.constexpr(PAGE_TOKENS)
_SPLIT = tl.constexpr(SPLIT_PAGES)


@triton.jit
def decode_splits(query, key, value, cache, tiles, starts, first_rows, sealed, head_frames, sink_frames, partial,
                  SHAPE: tl.constexpr, SEALED: tl.constexpr, OPEN: tl.constexpr, SINK: tl.constexpr,
                  M: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Grid ``(tiles, kv_heads, slots)``: slot 0 is the tile's own page, slot ``i + 1`` the ``i``-th split of pages.

    ``query``, ``key``, ``value``: (pointer, stride of a row, stride of a head); ``cache`` as for
    :func:`~kvbits.kernels.triton.tile.attend_sealed`; ``tiles`` ``int32 [tiles, 4]``: sequence, first row, queries,
    position of the first; ``sealed``: (``int32`` pointer, stride of a sequence); ``head_frames``, ``sink_frames``
    ``int32 [sequences]``.
    ``partial``: pointers to ``float32 [tiles, kv_heads, slots, M, value_block]`` (sums), ``[..., M]`` (maxima) and
    ``[..., M]`` (weights); rows that are none stay as they are. ``PARTS``: sealed
    pages are read in parts (:mod:`kvbits.kernels.triton.folded`), which needs queries in bfloat16.
    """
    index, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first, count, positions, rows, heads, valid = tile_rows(tiles, index, head, SHAPE, M)
    page = first // _TOKENS
    if (slot - 1) * _SPLIT >= page and slot > 0:
        return
    q = load_query(query, rows, heads, valid, tl.arange(0, SHAPE.key_block), SHAPE)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.full([M, SHAPE.value_block], 0.0, tl.float32)
    if slot == 0:
        frame = tl.load(head_frames + sequence).to(tl.int64)
        open_block = cache[0] + frame * cache[1] + cache[3] + head * OPEN.bytes
        start, first_row = tl.load(starts + sequence), tl.load(first_rows + sequence)
        m, total, acc = attend_few(
            q, key, value, valid, positions, open_block, head, page, start, first_row, first + count, M, SHAPE, OPEN
        )
    else:
        low = tl.maximum((slot - 1) * _SPLIT, oldest_page(first, SHAPE))
        high = tl.minimum(slot * _SPLIT, page)
        if low < high:
            if PARTS:
                m, total, acc = attend_pages(
                    q, query, rows, heads, valid, positions, cache, head, sealed[0] + sequence * sealed[1],
                    sink_frames + sequence, low, high, M, SHAPE, SEALED, SINK,
                )  # fmt: skip
            else:
                m, total, acc = attend_sealed(
                    q, query, rows, heads, valid, positions, cache, head, sealed[0] + sequence * sealed[1],
                    sink_frames + sequence, low, high, m, total, acc, SHAPE, SEALED, SINK,
                )  # fmt: skip
    row = tl.arange(0, M)
    place = ((index * SHAPE.kv_heads + head) * tl.num_programs(2) + slot).to(tl.int64) * M + row
    tl.store(partial[1] + place, m, mask=valid)
    tl.store(partial[2] + place, total, mask=valid)
    channel = tl.arange(0, SHAPE.value_block)
    tl.store(partial[0] + place[:, None] * SHAPE.value_block + channel[None, :], acc, mask=valid[:, None])


@triton.jit(do_not_specialize=["slots"])
def merge_splits(partial, tiles, sinks, out, slots, SHAPE: tl.constexpr, M: tl.constexpr):
    """Grid ``(tiles, kv_heads)``: the slots of :func:`decode_splits` in order, then the result.

    ``out``: (pointer, stride of a row, stride of a head).
    """
    index, head = tl.program_id(0), tl.program_id(1)
    _, first, _, _, rows, heads, valid = tile_rows(tiles, index, head, SHAPE, M)
    row, channel = tl.arange(0, M), tl.arange(0, SHAPE.value_block)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.full([M, SHAPE.value_block], 0.0, tl.float32)
    for slot in range(1 + tl.cdiv(first // _TOKENS, _SPLIT)):  # the rest holds nothing
        place = ((index * SHAPE.kv_heads + head) * slots + slot).to(tl.int64) * M + row
        its = tl.load(partial[1] + place, mask=valid, other=0.0)
        m_new = tl.maximum(m, its)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, beta = tl.exp2(m - base), tl.exp2(its - base)
        total = total * alpha + tl.load(partial[2] + place, mask=valid, other=1.0) * beta
        address = partial[0] + place[:, None] * SHAPE.value_block + channel[None, :]
        part = tl.load(address, mask=valid[:, None], other=0.0)
        acc = acc * alpha[:, None] + part * beta[:, None]
        m = m_new
    store_result(finish(m, total, acc, sinks, heads, SHAPE), out, rows, heads, valid, SHAPE)


@triton.jit
def prefill_tiles(query, key, value, cache, tiles, starts, first_rows, sealed, head_frames, sink_frames, sinks, out,
                  SHAPE: tl.constexpr, SEALED: tl.constexpr, OPEN: tl.constexpr, SINK: tl.constexpr,
                  M: tl.constexpr):  # fmt: skip
    """Grid ``(tiles, kv_heads)``: sealed pages, then the tile's own, and the result. Arguments as above."""
    index, head = tl.program_id(0), tl.program_id(1)
    sequence, first, count, positions, rows, heads, valid = tile_rows(tiles, index, head, SHAPE, M)
    page = first // _TOKENS
    q = load_query(query, rows, heads, valid, tl.arange(0, SHAPE.key_block), SHAPE)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.full([M, SHAPE.value_block], 0.0, tl.float32)
    m, total, acc = attend_sealed(
        q, query, rows, heads, valid, positions, cache, head, sealed[0] + sequence * sealed[1],
        sink_frames + sequence, oldest_page(first, SHAPE), page, m, total, acc, SHAPE, SEALED, SINK,
    )  # fmt: skip
    frame = tl.load(head_frames + sequence).to(tl.int64)
    open_block = cache[0] + frame * cache[1] + cache[3] + head * OPEN.bytes
    start, first_row = tl.load(starts + sequence), tl.load(first_rows + sequence)
    m, total, acc = attend_own(
        q, key, value, valid, positions, open_block, head, page, start, first_row, first + count, m, total, acc,
        SHAPE, OPEN,
    )  # fmt: skip
    store_result(finish(m, total, acc, sinks, heads, SHAPE), out, rows, heads, valid, SHAPE)
