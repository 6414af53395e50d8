"""A tile: some queries of one sequence, all in one page, times the query heads that share a KV head."""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.triton.codebook import centers
from kvbits.kernels.triton.dequantize import dequantize
from kvbits.kernels.triton.hadamard import rotate
from kvbits.kernels.triton.mixed import stored_channels
from kvbits.kernels.triton.numbers import convert
from kvbits.kernels.triton.own import load_own
from kvbits.kernels.triton.softmax import accumulate, logits, product

_TOKENS = tl.constexpr(PAGE_TOKENS)


@triton.jit
def tile_rows(tiles, index, head, SHAPE: tl.constexpr, M: tl.constexpr):
    """Sequence, first position, queries; and of the ``M`` rows: position, row, query head, whether they are any."""
    sequence = tl.load(tiles + 4 * index)
    first_row = tl.load(tiles + 4 * index + 1)
    count = tl.load(tiles + 4 * index + 2)
    first = tl.load(tiles + 4 * index + 3)
    row = tl.arange(0, M)
    query = row // SHAPE.group
    valid = query < count
    return sequence, first, count, first + query, first_row + query, head * SHAPE.group + row % SHAPE.group, valid


@triton.jit
def load_query(query, rows, heads, valid, channel, SHAPE: tl.constexpr):
    """``[m, channels]`` in the query's type; ``query``: (pointer, stride of a row, stride of a head)."""
    mask = valid[:, None] & (channel < SHAPE.key_dim)[None, :]
    offset = (rows.to(tl.int64) * query[1] + heads * query[2])[:, None] + channel[None, :]
    return tl.load(query[0] + offset, mask=mask, other=0.0)


@triton.jit
def oldest_page(first, SHAPE: tl.constexpr):
    """The first page that a query at ``first``, or a later one, sees anything of."""
    if SHAPE.window > 0:
        return tl.maximum(first - SHAPE.window + 1, 0) // _TOKENS
    else:
        return 0


@triton.jit
def _seen(scores, positions, page, valid, SHAPE: tl.constexpr):
    """``scores``, -inf where a query does not see a token."""
    distance = positions[:, None] - (tl.arange(0, _TOKENS) + page * _TOKENS)[None, :]
    visible = valid[:, None] & (distance >= 0)
    if SHAPE.window > 0:
        visible = visible & (distance < SHAPE.window)
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def page_scores(q, rotated, page, query, rows, heads, valid, SHAPE: tl.constexpr, FORMAT: tl.constexpr):
    """Products ``[m, 64]`` with the keys of the page at ``page``."""
    keys = dequantize(page, FORMAT)
    if FORMAT.kind == "mixed":
        # the page's order of channels, for the query too
        channel = stored_channels(page, FORMAT)
        stored = tl.where(tl.arange(0, FORMAT.dim_block) < FORMAT.dim, channel, FORMAT.dim)
        return product(load_query(query, rows, heads, valid, stored, SHAPE), keys)
    elif FORMAT.kind == "codebook":
        scores = product(rotated, keys)
        if FORMAT.centered:
            center = centers(page, FORMAT)
            scores += tl.sum(convert(q, tl.float32) * center[None, :], 1)[:, None]
        return scores
    else:
        return product(q, keys)


@triton.jit
def visit_sealed(q, rotated, query, rows, heads, valid, positions, page, block, m, total, acc,
                 SHAPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Take in one sealed page, whose head's block begins at the byte pointer ``block``."""
    KEYS: tl.constexpr = BLOCK.keys
    VALUES: tl.constexpr = BLOCK.values
    scores = page_scores(q, rotated, block, query, rows, heads, valid, SHAPE, KEYS)
    scores = _seen(logits(scores, SHAPE), positions, page, valid, SHAPE)
    return accumulate(scores, dequantize(block + BLOCK.values_at, VALUES), m, total, acc, q.dtype)


@triton.jit
def attend_sealed(q, query, rows, heads, valid, positions, cache, head, sealed_row, sink_row, low, high,
                  m, total, acc, SHAPE: tl.constexpr, SEALED: tl.constexpr, SINK: tl.constexpr):  # fmt: skip
    """Take in the sealed pages ``low`` to ``high - 1``; ``SINK`` is the first page's format where it has its own.

    ``cache``: (bytes, bytes of a frame, bytes of the sealed, the open and the first page in their frames);
    ``sealed_row``: the sequence's frames, ``sink_row``: that of its first page. ``acc`` is 0 and goes unrotated.
    """
    rotated = q
    if SHAPE.rotated_keys:
        rotated = rotate(convert(q, tl.float32), False, SHAPE.key_rotate, SHAPE.key_rotate_steps)
        rotated = convert(rotated, q.dtype)
    if SINK is not None:
        if (low == 0) & (high > 0):
            frame = tl.load(sink_row).to(tl.int64)
            block = cache[0] + frame * cache[1] + cache[4] + head * SINK.bytes
            m, total, acc = visit_sealed(
                q, rotated, query, rows, heads, valid, positions, 0, block, m, total, acc, SHAPE, SINK
            )
            if SINK.values.rotate > 0:
                acc = rotate(acc, False, SINK.values.rotate, SINK.values.rotate_steps)
        low = tl.maximum(low, 1)
        if SEALED.values.rotate > 0:
            acc = rotate(acc, False, SEALED.values.rotate, SEALED.values.rotate_steps)
    for page in range(low, high):
        frame = tl.load(sealed_row + page).to(tl.int64)
        block = cache[0] + frame * cache[1] + cache[2] + head * SEALED.bytes
        m, total, acc = visit_sealed(
            q, rotated, query, rows, heads, valid, positions, page, block, m, total, acc, SHAPE, SEALED
        )
    if SEALED.values.rotate > 0:
        acc = rotate(acc, False, SEALED.values.rotate, SEALED.values.rotate_steps)
    return m, total, acc


@triton.jit
def attend_own(q, key, value, valid, positions, open_block, head, page, start, first_row, end, m, total, acc,
               SHAPE: tl.constexpr, OPEN: tl.constexpr):  # fmt: skip
    """Take in the page of the queries, in 16 bit. ``end``: the position after the last query."""
    channel = tl.arange(0, SHAPE.key_block)
    keys = load_own(key, open_block, head, page, start, first_row, end, channel, True, SHAPE.key_dim)
    scores = logits(product(q, keys), SHAPE)
    channel = tl.arange(0, SHAPE.value_block)
    values = load_own(
        value, open_block + OPEN.values_at, head, page, start, first_row, end, channel, False, SHAPE.value_dim
    )
    return accumulate(_seen(scores, positions, page, valid, SHAPE), values, m, total, acc, q.dtype)


@triton.jit
def store_result(result, out, rows, heads, valid, SHAPE: tl.constexpr):
    """``[m, value_dim]`` in the type of ``out``: (pointer, stride of a row, stride of a head)."""
    channel = tl.arange(0, SHAPE.value_block)
    target = out[0] + (rows.to(tl.int64) * out[1] + heads * out[2])[:, None] + channel[None, :]
    mask = valid[:, None] & (channel < SHAPE.value_dim)[None, :]
    tl.store(target, convert(result, out[0].dtype.element_ty), mask=mask)
