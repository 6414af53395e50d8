"""Decode's way over sealed pages, for bfloat16 rows: parts of pages where the formats allow it."""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.triton.codebook import centers
from kvbits.kernels.triton.dequantize import dequantize
from kvbits.kernels.triton.folded import (
    accumulate_units,
    in_order,
    key_scores,
    ordered_channels,
    part,
    part_rows,
    parts_of,
    token_order,
)
from kvbits.kernels.triton.hadamard import rotate
from kvbits.kernels.triton.numbers import convert, widen
from kvbits.kernels.triton.own import load_own
from kvbits.kernels.triton.softmax import accumulate, logits, product
from kvbits.kernels.triton.tile import load_query, page_scores

_TOKENS = tl.constexpr(PAGE_TOKENS)
_FEW = tl.constexpr(16)  # tokens of the own page that a program's registers hold


@triton.jit
def _query_part(rotated, query, rows, heads, valid, INDEX: tl.constexpr, SHAPE: tl.constexpr, FORMAT: tl.constexpr):
    PARTS: tl.constexpr = parts_of(FORMAT)
    if FORMAT.rotate > 0:
        return part(ordered_channels(rotated, FORMAT), INDEX, PARTS)
    else:
        size: tl.constexpr = FORMAT.dim_block // PARTS
        channel = part_rows(INDEX * size + tl.arange(0, size), PARTS, FORMAT.dim_block)
        return load_query(query, rows, heads, valid, channel, SHAPE)


@triton.jit
def _query_parts(q, rotated, query, rows, heads, valid, SHAPE: tl.constexpr, FORMAT: tl.constexpr):
    """The query's channels as a page of keys takes them: a tensor for each part."""
    PARTS: tl.constexpr = parts_of(FORMAT)
    if PARTS <= 1:
        return (rotated if FORMAT.rotate > 0 else q,)
    elif PARTS == 2:
        return (
            _query_part(rotated, query, rows, heads, valid, 0, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 1, SHAPE, FORMAT),
        )
    elif PARTS == 4:
        return (
            _query_part(rotated, query, rows, heads, valid, 0, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 1, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 2, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 3, SHAPE, FORMAT),
        )
    else:
        tl.static_assert(PARTS == 8)
        return (
            _query_part(rotated, query, rows, heads, valid, 0, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 1, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 2, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 3, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 4, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 5, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 6, SHAPE, FORMAT),
            _query_part(rotated, query, rows, heads, valid, 7, SHAPE, FORMAT),
        )


@triton.jit
def _visit(q, rotated, parts, sums, query, rows, heads, valid, positions, page, block, state,
           SHAPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Take in one sealed page; ``state`` as for :func:`~kvbits.kernels.triton.folded.accumulate_units`."""
    KEYS: tl.constexpr = BLOCK.keys
    VALUES: tl.constexpr = BLOCK.values
    if parts_of(KEYS) > 0:
        scores = key_scores(parts, sums, block, KEYS, VALUES)
        if KEYS.centered:
            scores += tl.sum(widen(q) * centers(block, KEYS)[None, :], 1)[:, None]
    else:
        scores = in_order(page_scores(q, rotated, block, query, rows, heads, valid, SHAPE, KEYS), VALUES)
    scores = logits(scores, SHAPE)
    if SHAPE.window > 0:
        distance = positions[:, None] - (token_order(VALUES) + page * _TOKENS)[None, :]
        scores = tl.where(distance < SHAPE.window, scores, float("-inf"))
    if parts_of(VALUES) > 0:
        return accumulate_units(scores, block + BLOCK.values_at, state, VALUES)
    else:
        m, total, acc, rest = state
        m, total, acc = accumulate(scores, dequantize(block + BLOCK.values_at, VALUES), m, total, acc, q.dtype)
        return m, total, acc, rest


@triton.jit
def _whole(state, VALUES: tl.constexpr):
    """The sums of weighted values, as they were before the values were rotated."""
    m, total, acc, rest = state
    acc += rest[:, None]
    if VALUES.rotate > 0:
        acc = rotate(acc, False, VALUES.rotate, VALUES.rotate_steps)
    return m, total, acc, tl.zeros_like(rest)


@triton.jit
def attend_pages(q, query, rows, heads, valid, positions, cache, head, sealed_row, sink_row, low, high, M: tl.constexpr,
                 SHAPE: tl.constexpr, SEALED: tl.constexpr, SINK: tl.constexpr):  # fmt: skip
    """Maxima, sums of weights and of weighted values of the sealed pages ``low`` to ``high - 1``, all of them before
    the queries' own; arguments as for :func:`~kvbits.kernels.triton.tile.attend_sealed`."""
    KEYS: tl.constexpr = SEALED.keys
    VALUES: tl.constexpr = SEALED.values
    state = (
        tl.full([M], float("-inf"), tl.float32),
        tl.zeros([M], tl.float32),
        tl.full([M, SHAPE.value_block], 0.0, tl.float32),
        tl.zeros([M], tl.float32),
    )
    rotated = q
    if SHAPE.rotated_keys:
        rotated = rotate(widen(q), False, SHAPE.key_rotate, SHAPE.key_rotate_steps)
        rotated = convert(rotated, q.dtype)
    sums = tl.sum(widen(q), 1)
    if SINK is not None:
        if (low == 0) & (high > 0):
            SINK_KEYS: tl.constexpr = SINK.keys
            SINK_VALUES: tl.constexpr = SINK.values
            frame = tl.load(sink_row).to(tl.int64)
            block = cache[0] + frame * cache[1] + cache[4] + head * SINK.bytes
            parts = _query_parts(q, rotated, query, rows, heads, valid, SHAPE, SINK_KEYS)
            state = _visit(
                q, rotated, parts, sums, query, rows, heads, valid, positions, 0, block, state, SHAPE, SINK
            )  # fmt: skip
            state = _whole(state, SINK_VALUES)
        low = tl.maximum(low, 1)
        if SEALED.values.rotate > 0:
            # in the pages' own basis, in which the rest is added
            m, total, acc, rest = state
            state = m, total, rotate(acc, False, SEALED.values.rotate, SEALED.values.rotate_steps), rest
    parts = _query_parts(q, rotated, query, rows, heads, valid, SHAPE, KEYS)
    for page in range(low, high):
        frame = tl.load(sealed_row + page).to(tl.int64)
        block = cache[0] + frame * cache[1] + cache[2] + head * SEALED.bytes
        state = _visit(q, rotated, parts, sums, query, rows, heads, valid, positions, page, block, state, SHAPE, SEALED)
    m, total, acc, _ = _whole(state, VALUES)
    return m, total, acc


@triton.jit
def attend_few(q, key, value, valid, positions, open_block, head, page, start, first_row, end, M: tl.constexpr,
               SHAPE: tl.constexpr, OPEN: tl.constexpr):  # fmt: skip
    """The same of the queries' own page, in 16 bit, some tokens at a time; arguments as for
    :func:`~kvbits.kernels.triton.tile.attend_own`."""
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.full([M, SHAPE.value_block], 0.0, tl.float32)
    for skip in range(0, end - page * _TOKENS, _FEW):
        channel = tl.arange(0, SHAPE.key_block)
        keys = load_own(
            key, open_block, head, page, start, first_row, end, channel, True, SHAPE.key_dim, skip, _FEW
        )  # fmt: skip
        scores = logits(product(q, keys), SHAPE)
        distance = positions[:, None] - (page * _TOKENS + skip + tl.arange(0, _FEW))[None, :]
        seen = valid[:, None] & (distance >= 0)
        if SHAPE.window > 0:
            seen = seen & (distance < SHAPE.window)
        channel = tl.arange(0, SHAPE.value_block)
        values = load_own(
            value, open_block + OPEN.values_at, head, page, start, first_row, end, channel, False, SHAPE.value_dim,
            skip, _FEW,
        )  # fmt: skip
        m, total, acc = accumulate(tl.where(seen, scores, float("-inf")), values, m, total, acc, q.dtype)
    return m, total, acc
