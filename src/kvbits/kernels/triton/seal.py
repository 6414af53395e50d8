"""Full pages become codes: a program for the keys and one for the values of each page and head."""

import triton
import triton.language as tl

from kvbits.kernels.triton.affine import quantize_affine
from kvbits.kernels.triton.codebook import quantize_codebook
from kvbits.kernels.triton.float8 import quantize_float8
from kvbits.kernels.triton.mixed import by_reach, quantize_mixed
from kvbits.kernels.triton.numbers import widen
from kvbits.kernels.triton.own import load_own
from kvbits.kernels.triton.raw import quantize_raw


@triton.jit
def seal_pages(key, value, cache, pages, starts, first_rows, open_frames, sealed_frames, key_rounding, value_rounding,
               OPEN: tl.constexpr, SEALED: tl.constexpr):  # fmt: skip
    """Grid ``(pages, kv_heads, 2)``: keys, then values.

    ``key``, ``value``: the step's rows, ``bfloat16`` (pointer, stride of a row, stride of a head). ``cache``: (bytes,
    bytes of a frame, bytes of the open and of the sealed page in their frames).
    ``pages`` ``int32 [pages, 2]``: sequence and page, -1 for none; ``starts``, ``first_rows``, ``open_frames`` ``int32
    [sequences]``; ``sealed_frames``: (``int32`` pointer, stride of a sequence). The roundings: (clip, feedback, order,
    rank), each ``None`` or a pointer.
    """
    KEYS: tl.constexpr = SEALED.keys
    VALUES: tl.constexpr = SEALED.values
    item, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(pages + 2 * item)
    page = tl.load(pages + 2 * item + 1)
    if page < 0:
        return
    start, first_row = tl.load(starts + sequence), tl.load(first_rows + sequence)
    open_frame = tl.load(open_frames + sequence).to(tl.int64)
    frame = tl.load(sealed_frames[0] + sequence * sealed_frames[1] + page).to(tl.int64)
    open_page = cache[0] + open_frame * cache[1] + cache[2] + head * OPEN.bytes
    target = cache[0] + frame * cache[1] + cache[3] + head * SEALED.bytes
    if tl.program_id(2) == 0:
        _seal(key, open_page, target, head, page, start, first_row, key_rounding, KEYS)
    else:
        _seal(
            value, open_page + OPEN.values_at, target + SEALED.values_at, head, page, start, first_row, value_rounding,
            VALUES,
        )  # fmt: skip


@triton.jit
def _seal(rows, open_page, target, head, page, start, first_row, rounding, FORMAT: tl.constexpr):
    clip, feedback, order, rank = rounding
    if clip is not None:
        clip = clip + head
    if feedback is not None:
        feedback = feedback + head * FORMAT.dim * FORMAT.dim
    if order is not None:
        order = order + head * FORMAT.dim
        rank = rank + head * FORMAT.dim
    end = (page + 1) * 64
    channels = tl.arange(0, FORMAT.dim_block)
    x = widen(load_own(rows, open_page, head, page, start, first_row, end, channels, FORMAT.key, FORMAT.dim))
    if FORMAT.kind == "raw":
        quantize_raw(x, target, FORMAT)
    elif FORMAT.kind == "float8":
        quantize_float8(x, target, FORMAT)
    elif FORMAT.kind == "codebook":
        quantize_codebook(x, target, clip, feedback, order, rank, FORMAT)
    elif FORMAT.kind == "mixed":
        if order is None:
            channels = by_reach(x, FORMAT)
        else:
            channels = tl.load(order + channels, mask=channels < FORMAT.dim, other=FORMAT.dim)
        stored = tl.where(tl.arange(0, FORMAT.dim_block) < FORMAT.dim, channels, FORMAT.dim)
        x = widen(load_own(rows, open_page, head, page, start, first_row, end, stored, FORMAT.key, FORMAT.dim))
        quantize_mixed(x, channels, target, FORMAT)
    elif FORMAT.kind == "blocks":
        inner: tl.constexpr = FORMAT.inner
        for block in range(FORMAT.dim // FORMAT.stride):
            inside = block * FORMAT.stride + tl.arange(0, FORMAT.stride)
            part = load_own(rows, open_page, head, page, start, first_row, end, inside, FORMAT.key, FORMAT.dim)
            quantize_affine(widen(part), target + block * FORMAT.bytes, None, None, None, None, inner)
    else:
        tl.static_assert(FORMAT.kind == "affine" or FORMAT.kind == "nibbles")
        quantize_affine(x, target, clip, feedback, order, rank, FORMAT)
