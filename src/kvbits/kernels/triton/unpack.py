"""Sealed pages as 16-bit rows again, for what reads a page many times: :mod:`kvbits.kernels.triton.prompt`."""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.triton.codebook import centers
from kvbits.kernels.triton.dequantize import dequantize
from kvbits.kernels.triton.hadamard import rotate
from kvbits.kernels.triton.mixed import stored_channels
from kvbits.kernels.triton.numbers import convert

_TOKENS = tl.constexpr(PAGE_TOKENS)


@triton.jit
def _unpack_side(page, target, at, FORMAT: tl.constexpr):
    x = dequantize(page, FORMAT)
    if FORMAT.kind == "codebook":
        x = rotate(x, FORMAT.key, FORMAT.rotate, FORMAT.rotate_steps)
        if FORMAT.centered:
            x += tl.expand_dims(centers(page, FORMAT), 1 if FORMAT.key else 0)
    if FORMAT.key:
        x = tl.trans(x)
    channel = tl.arange(0, FORMAT.dim_block)
    inside = channel < FORMAT.dim
    if FORMAT.kind == "mixed":
        channel = stored_channels(page, FORMAT)
    token = at + tl.arange(0, _TOKENS)
    mask = (token >= 0)[:, None] & inside[None, :]
    place = token.to(tl.int64)[:, None] * FORMAT.dim + channel[None, :]
    tl.store(target + place, convert(x, target.dtype.element_ty), mask=mask)


@triton.jit
def _unpack(block, keys, values, at, BLOCK: tl.constexpr):
    KEYS: tl.constexpr = BLOCK.keys  # Triton 3.6 passes on as constants only what has such a name
    VALUES: tl.constexpr = BLOCK.values
    _unpack_side(block, keys, at, KEYS)
    _unpack_side(block + BLOCK.values_at, values, at, VALUES)


@triton.jit(do_not_specialize=["tokens"])
def unpack_pages(cache, sealed, sink_frames, pages, keys, values, tokens, SHAPE: tl.constexpr,
                 SEALED: tl.constexpr, SINK: tl.constexpr):  # fmt: skip
    """Grid ``(slots, kv_heads)``: ``pages`` ``int32 [slots, 2]``, sequence and page of each slot.

    ``cache``: (bytes, bytes of a frame, bytes of the sealed and of the first page in their frames); ``sealed``:
    (``int32`` pointer, stride of a sequence); ``sink_frames`` ``int32 [sequences]``; ``keys`` and ``values``
    ``[kv_heads, tokens, dim]``, ``tokens`` those of all slots.
    """
    slot, head = tl.program_id(0), tl.program_id(1)
    sequence, page = tl.load(pages + 2 * slot), tl.load(pages + 2 * slot + 1)
    keys += head.to(tl.int64) * tokens * SHAPE.key_dim
    values += head.to(tl.int64) * tokens * SHAPE.value_dim
    if SINK is not None:
        if page == 0:
            frame = tl.load(sink_frames + sequence).to(tl.int64)
            _unpack(cache[0] + frame * cache[1] + cache[3] + head * SINK.bytes, keys, values, slot * _TOKENS, SINK)
        else:
            frame = tl.load(sealed[0] + sequence * sealed[1] + page).to(tl.int64)
            _unpack(cache[0] + frame * cache[1] + cache[2] + head * SEALED.bytes, keys, values, slot * _TOKENS, SEALED)
    else:
        frame = tl.load(sealed[0] + sequence * sealed[1] + page).to(tl.int64)
        _unpack(cache[0] + frame * cache[1] + cache[2] + head * SEALED.bytes, keys, values, slot * _TOKENS, SEALED)
