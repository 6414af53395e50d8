"""Attention of prompts to pages that were decoded before: tiles of queries, softmax in registers, no splits.

The order of Dao 2023 (FlashAttention-2): a program keeps its queries, maxima, sums and weighted values in registers and
passes over keys and values once. Nearly all pages are seen by all of a tile's queries: no masks there.
"""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.triton.numbers import INTERPRETED, convert, widen
from kvbits.kernels.triton.softmax import finish, logits
from kvbits.kernels.triton.tile import attend_own, load_query, store_result

_TOKENS = tl.constexpr(PAGE_TOKENS)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(pointer, first, end, N: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """``[N, BLOCK]``: tokens from ``first`` on; with ``MASKED`` 0 from ``end`` on."""
    token, channel = tl.arange(0, N), tl.arange(0, BLOCK)
    place = pointer + token[:, None] * DIM + channel[None, :]
    if MASKED:
        return tl.load(place, mask=(token + first < end)[:, None] & (channel < DIM)[None, :], other=0.0)
    elif DIM == BLOCK:
        return tl.load(place)
    else:
        return tl.load(place, mask=(channel < DIM)[None, :], other=0.0)


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def _visit(q, keys, values, positions, first, end, m, total, acc, SHAPE: tl.constexpr, M: tl.constexpr,
           N: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Take in ``N`` tokens, the first at the position ``first``. ``MASKED``: those from ``end`` on, and those that a
    window hides, are not seen."""
    k = _load(keys, first, end, N, SHAPE.key_dim, SHAPE.key_block, MASKED)
    scores = _dot(q, tl.trans(k), tl.zeros([M, N], tl.float32))
    factor = 1.0
    if SHAPE.softcap > 0 or SHAPE.scale < 0:
        scores = logits(scores, SHAPE)
    else:
        factor = SHAPE.scale * _LOG2E  # one fused operation with the subtraction of the maximum
    if MASKED:
        token = tl.arange(0, N) + first
        visible = (token < end)[None, :]
        if SHAPE.window > 0:
            visible = visible & (positions[:, None] - token[None, :] < SHAPE.window)
        scores = tl.where(visible, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * factor)
    base = m_new
    if MASKED:  # rows that have seen nothing yet have no maximum to subtract
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2(scores * factor - base[:, None])
    alpha = tl.exp2(m - base)
    total = total * alpha + tl.sum(weights, 1)
    v = _load(values, first, end, N, SHAPE.value_dim, SHAPE.value_block, MASKED)
    acc = _dot(convert(weights, q.dtype), v, acc * alpha[:, None])
    return m_new, total, acc


@triton.jit
def _visit_pages(q, keys, values, positions, last, low, high, m, total, acc, SHAPE: tl.constexpr, M: tl.constexpr,
                 PAGES: tl.constexpr):  # fmt: skip
    """Take in the pages ``low`` to ``high - 1``, of which ``low`` begins at ``keys`` and ``values``; the last of the
    queries is at ``last``."""
    N: tl.constexpr = PAGES * _TOKENS
    if SHAPE.window > 0:
        # the pages that hide something from the last query, at most two
        whole = tl.minimum(tl.maximum(tl.maximum(last - SHAPE.window + _TOKENS, 0) // _TOKENS, low), high)
        for page in range(low, whole):
            m, total, acc = _visit(
                q, keys, values, positions, page * _TOKENS, (page + 1) * _TOKENS, m, total, acc, SHAPE, M, _TOKENS, True
            )
            keys += _TOKENS * SHAPE.key_dim
            values += _TOKENS * SHAPE.value_dim
        low = whole
    for _ in range((high - low) // PAGES):
        m, total, acc = _visit(q, keys, values, positions, 0, 0, m, total, acc, SHAPE, M, N, False)
        keys += N * SHAPE.key_dim
        values += N * SHAPE.value_dim
    if PAGES > 1:
        rest = (high - low) % PAGES
        if rest > 0:
            m, total, acc = _visit(
                q, keys, values, positions, (high - rest) * _TOKENS, high * _TOKENS, m, total, acc, SHAPE, M, N, True
            )
    return m, total, acc


@triton.jit(do_not_specialize=["tokens"])
def attend_decoded(query, key, value, cache, tiles, starts, first_rows, head_frames, keys, values, tokens, sinks, out,
                   carried, SHAPE: tl.constexpr, OPEN: tl.constexpr, M: tl.constexpr, PAGES: tl.constexpr):  # fmt: skip
    """Grid ``(tiles, kv_heads)``: decoded pages, ``PAGES`` at a time, then the queries' own page, and the result.

    ``query``, ``key``, ``value``, ``out``: (pointer, stride of a row, stride of a head), bfloat16; ``cache``: (bytes,
    bytes of a frame, bytes of the open page in its frame); ``tiles`` ``int32 [tiles, 8]``: see
    :class:`~kvbits.kernels.triton.pieces.Piece`; ``keys``, ``values`` ``bfloat16 [kv_heads, tokens, dim]``.
    ``carried``: ``None``, or where tiles whose pages come in several launches leave their state, ``float32``: weighted
    values ``[rows, heads, value_dim]``, maxima and sums ``[rows, heads]``.
    """
    index, head = tl.program_id(0), tl.program_id(1)
    tile = tiles + 8 * index
    sequence, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    low, high, slot = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    start, first_row = tl.load(starts + sequence), tl.load(first_rows + sequence)
    row = tl.arange(0, M)
    token = (first + row) // SHAPE.group
    valid = row < count
    positions, rows, heads = start + token, first_row + token, head * SHAPE.group + (first + row) % SHAPE.group
    last = start + (first + count - 1) // SHAPE.group
    q = load_query(query, rows, heads, valid, tl.arange(0, SHAPE.key_block), SHAPE)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.full([M, SHAPE.value_block], 0.0, tl.float32)
    place = rows.to(tl.int64) * (SHAPE.kv_heads * SHAPE.group) + heads
    channel = tl.arange(0, SHAPE.value_block)
    state = place[:, None] * SHAPE.value_dim + channel[None, :]
    inside = valid[:, None] & (channel < SHAPE.value_dim)[None, :]
    if carried is not None:  # noqa: SIM102 - known when it is compiled
        if tl.load(tile + 6) == 0:
            acc = tl.load(carried[0] + state, mask=inside, other=0.0)
            m = tl.load(carried[1] + place, mask=valid, other=0.0)
            total = tl.load(carried[2] + place, mask=valid, other=0.0)
    at = (head * tokens + slot * _TOKENS).to(tl.int64)
    m, total, acc = _visit_pages(
        q, keys + at * SHAPE.key_dim, values + at * SHAPE.value_dim, positions, last, low, high, m, total, acc,
        SHAPE, M, PAGES,
    )  # fmt: skip
    if carried is not None:  # noqa: SIM102 - known when it is compiled
        if tl.load(tile + 7) == 0:
            tl.store(carried[0] + state, acc, mask=inside)
            tl.store(carried[1] + place, m, mask=valid)
            tl.store(carried[2] + place, total, mask=valid)
            return
    open_block = cache[0] + tl.load(head_frames + sequence).to(tl.int64) * cache[1] + cache[2] + head * OPEN.bytes
    m, total, acc = attend_own(
        q, key, value, valid, positions, open_block, head, last // _TOKENS, start, first_row, last + 1, m, total, acc,
        SHAPE, OPEN,
    )  # fmt: skip
    store_result(finish(m, total, acc, sinks, heads, SHAPE), out, rows, heads, valid, SHAPE)
