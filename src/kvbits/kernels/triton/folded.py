"""Sealed pages without dequantizing them: codes go to the product as bfloat16 integers, scales to the other operand.

Pages are read as 16-bit halfwords, ``16 / width`` codes each: a *part* is what lies at one place of all halfwords,
and a product takes a part at a time. So no code moves between threads: Triton loads the halfwords in the order of the
product's operand, and the rest is arithmetic in registers. Rows of a part lie apart in the page (:func:`part_rows`);
queries come in the order of the keys' channels, softmax weights in that of the values' tokens.

Of ``scale * (unit - offset) + zero``, where ``unit`` is the integer that is multiplied, the scale is multiplied into
the query or the weights and rounded there; what the middle ``unit`` means is added apart, so that the error of the
rounding meets what remains of a code, half of its range at most.
"""

import triton
import triton.language as tl

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.triton.choose import entry
from kvbits.kernels.triton.numbers import convert, from_scale8, nearest16, widen
from kvbits.kernels.triton.softmax import product, rescaled

_TOKENS = tl.constexpr(PAGE_TOKENS)
_LEAST = tl.constexpr(16)  # rows of a part: what tensor cores multiply at once


@triton.constexpr_function
def _width(form) -> int:
    """Bits of a code in its halfword; 0 for formats that have to be dequantized."""
    if form.kind == "raw":
        return 16
    if form.kind == "float8":
        return 8
    if form.kind == "nibbles" or (form.kind == "codebook" and form.bits == 4):
        return 4
    return form.bits if form.kind == "affine" and form.bits in (2, 4, 8) else 0


@triton.constexpr_function
def parts_of(form) -> int:
    """Parts of a page, 0 where it is not read in parts."""
    width = _width(form)
    if width == 0 or (not form.key and not form.per_row and form.kind in ("affine", "nibbles")):
        return 0
    return 16 // width if form.row_block * width // 16 >= _LEAST.value else 0


@triton.constexpr_function
def in_parts(block) -> bool:
    """Whether keys and values of a :class:`~kvbits.kernels.triton.format.Block` are both read in parts."""
    return parts_of(block.keys) > 0 and parts_of(block.values) > 0


@triton.constexpr_function
def _offset(form) -> float:
    """The unit of what has the value ``zero``; of a draft, 16 high nibbles are a unit."""
    if form.kind == "nibbles":
        if form.draft:
            return 128.0 + ((128.0 if form.symmetric else 0.0) - 7.5) / 16.0
        return 128.0 if form.symmetric else 0.0
    return (0.0 if form.bits == 8 else 128.0) + (2.0 ** (form.bits - 1) if form.symmetric else 0.0)


@triton.constexpr_function
def _middle(form) -> float:
    """The unit in the middle of all, exact in bfloat16."""
    bits = 4 if form.kind == "nibbles" and form.draft else form.bits
    return 128.0 if bits == 8 else 128.0 + 2.0 ** (bits - 1)


@triton.jit
def part_rows(index, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Which row of a page the ``index``-th is, part after part, of ``BLOCK`` rows in ``PARTS`` parts."""
    if PARTS == 1:
        return index
    else:
        size: tl.constexpr = BLOCK // PARTS
        places: tl.constexpr = PARTS // 2  # of codes in a byte
        part, row = index // size, index % size
        return row // 2 * (2 * PARTS) + part % places * 4 + row % 2 * 2 + part // places


@triton.jit
def _halfwords(page, AT: tl.constexpr, PARTS: tl.constexpr, ORDER: tl.constexpr, FORMAT: tl.constexpr):
    """``uint16 [row_block / PARTS, lane_block]``; lanes in the order of a page of ``ORDER`` parts."""
    words: tl.constexpr = FORMAT.row_block // PARTS // 2
    word = tl.arange(0, words)
    half = tl.arange(0, 2 * FORMAT.lane_block)
    address = (page + AT).to(tl.pointer_type(tl.uint16)) + word[:, None] * (2 * FORMAT.lanes) + half[None, :]
    if FORMAT.rows == FORMAT.row_block and FORMAT.lanes == FORMAT.lane_block:
        x = tl.load(address)
    else:
        mask = (word < FORMAT.rows // PARTS // 2)[:, None] & (half < 2 * FORMAT.lanes)[None, :]
        x = tl.load(address, mask=mask, other=0)
    if ORDER <= 1:
        x = tl.permute(tl.reshape(x, [words, FORMAT.lane_block, 2]), (0, 2, 1))
    else:
        x = tl.reshape(x, [words, FORMAT.lane_block // (2 * ORDER), ORDER // 2, 2, 2, 2])
        x = tl.permute(x, (0, 5, 4, 2, 1, 3))
    return tl.reshape(x, [2 * words, FORMAT.lane_block])


@triton.jit
def _codes(page, PARTS: tl.constexpr, ORDER: tl.constexpr, FORMAT: tl.constexpr):
    """The halfwords of all parts; (high, low) where nibbles lie in two planes."""
    high = _halfwords(page, 0, PARTS, ORDER, FORMAT)
    if FORMAT.kind == "nibbles" and not FORMAT.draft:
        return high, _halfwords(page, FORMAT.second_at, PARTS, ORDER, FORMAT)
    else:
        return high, high


@triton.jit
def _units(halfwords, PART: tl.constexpr, PARTS: tl.constexpr, FORMAT: tl.constexpr):
    """The integers of a part, ``bfloat16``."""
    high, low = halfwords
    width: tl.constexpr = 16 // PARTS
    shift: tl.constexpr = PART * width
    mask: tl.constexpr = (1 << width) - 1
    if FORMAT.kind == "raw":
        return high.to(tl.bfloat16, bitcast=True)
    elif FORMAT.kind == "codebook":
        return convert(entry(((high >> shift) & mask).to(tl.int32), FORMAT.bits), tl.bfloat16)
    elif FORMAT.kind == "float8":
        # e5m2 is the upper half of a float16; e4m3 that of one 2**-8 as large, but for the sign
        top = high << (8 - shift)
        bits = top & 0xFF00 if FORMAT.bits == 2 else (top & 0x8000) | ((top & 0x7F00) >> 1)
        return convert(bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32), tl.bfloat16)
    elif FORMAT.kind == "nibbles" and not FORMAT.draft:
        code = (((high >> shift) & 15) << 4) | ((low >> shift) & 15)
        return convert(code.to(tl.float32), tl.bfloat16)
    else:
        code = (high >> shift) & mask
        if FORMAT.symmetric and FORMAT.kind == "affine" and not FORMAT.key:
            code = code ^ (1 << (width - 1))
        if width == 8:
            return convert(code.to(tl.float32), tl.bfloat16)
        else:
            # 128 and the code behind it
            return (code | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _params(page, index, FORMAT: tl.constexpr):
    """Scales ``float32`` and what the middle unit means of rows (or lanes) ``index``; 0 for those that are none."""
    count: tl.constexpr = FORMAT.rows if FORMAT.per_row else FORMAT.lanes
    inside = index < count
    if FORMAT.kind == "nibbles":
        scale = from_scale8(tl.load(page + FORMAT.params_at + index, mask=inside, other=0))
        zeros = (page + FORMAT.params_at + count).to(tl.pointer_type(tl.float16))
    else:
        params = (page + FORMAT.params_at).to(tl.pointer_type(tl.float16))
        scale = tl.load(params + index, mask=inside, other=0.0).to(tl.float32)
        zeros = params + count
    if FORMAT.kind == "nibbles" and FORMAT.draft:
        scale = 16.0 * scale
    middle = scale * (_middle(FORMAT) - _offset(FORMAT))
    if not FORMAT.symmetric:
        middle += tl.load(zeros + index, mask=inside, other=0.0).to(tl.float32)
    return scale, middle


@triton.jit
def page_scale(page, FORMAT: tl.constexpr):
    """What all units of a page of floats are multiplied by."""
    scale = tl.load((page + FORMAT.params_at).to(tl.pointer_type(tl.float32)))
    return scale * 256.0 if FORMAT.bits == 3 else scale


@triton.jit
def token_order(VALUES: tl.constexpr):
    """The token of each score, ``int32 [64]``, in the order in which a page of values takes the weights."""
    return part_rows(tl.arange(0, _TOKENS), parts_of(VALUES), _TOKENS)


@triton.jit
def part(x, INDEX: tl.constexpr, PARTS: tl.constexpr):
    """The columns of a part of ``[m, PARTS * n]``."""
    if PARTS == 1:
        return x
    else:
        low, high = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
        if INDEX < PARTS // 2:
            return part(low, INDEX, PARTS // 2)
        else:
            return part(high, INDEX - PARTS // 2, PARTS // 2)


@triton.jit
def key_scores(queries, sums, page, FORMAT: tl.constexpr, VALUES: tl.constexpr):
    """Products ``float32 [m, 64]`` with a page of keys, tokens in the order of :func:`token_order`.

    ``queries``: a tensor ``[m, channels]`` for each part; ``sums`` ``[m]``: of the query's channels.
    """
    PARTS: tl.constexpr = parts_of(FORMAT)
    ORDER: tl.constexpr = parts_of(VALUES)
    size: tl.constexpr = FORMAT.dim_block // PARTS
    halfwords = _codes(page, PARTS, ORDER, FORMAT)
    scores = tl.zeros([queries[0].shape[0], _TOKENS], tl.float32)
    if FORMAT.kind == "affine" or FORMAT.kind == "nibbles":
        if FORMAT.per_row:
            # sums over channels are products too: what is multiplied lies as products want it, and nowhere else
            rest = tl.zeros([queries[0].shape[0], _LEAST], tl.float32)
            ones = tl.full([size, _LEAST], -_middle(FORMAT), tl.float32)
            for i in tl.static_range(PARTS):
                row = part_rows(i * size + tl.arange(0, size), PARTS, FORMAT.dim_block)
                scale, middle = _params(page, row, FORMAT)
                scaled = convert(widen(queries[i]) * scale[None, :], tl.bfloat16)
                rounded, high = nearest16(middle)
                rest = product(queries[i], tl.broadcast_to(high[:, None], [size, _LEAST]), rest)
                low = convert(middle - rounded, tl.bfloat16)
                rest = product(queries[i], tl.broadcast_to(low[:, None], [size, _LEAST]), rest)
                rest = product(scaled, ones, rest)
                scores = product(scaled, _units(halfwords, i, PARTS, FORMAT), scores)
            return scores + tl.max(rest, 1)[:, None]
        else:
            for i in tl.static_range(PARTS):
                scores = product(queries[i], _units(halfwords, i, PARTS, FORMAT), scores)
            scale, middle = _params(page, token_order(VALUES), FORMAT)
            return (scores - (sums * _middle(FORMAT))[:, None]) * scale[None, :] + sums[:, None] * middle[None, :]
    else:
        for i in tl.static_range(PARTS):
            scores = product(queries[i], _units(halfwords, i, PARTS, FORMAT), scores)
        if FORMAT.kind == "codebook":
            scale = from_scale8(tl.load(page + FORMAT.params_at + token_order(VALUES)))
            return scores * scale[None, :]
        elif FORMAT.kind == "float8":
            return scores * page_scale(page, FORMAT)
        else:
            return scores


@triton.jit
def accumulate_units(scores, page, state, FORMAT: tl.constexpr):
    """Take in a page of values; ``scores`` as from :func:`key_scores`, -inf where nothing is seen.

    ``state``: maxima, sums of weights, sums of weighted values but for ``rest`` ``[m]``, which every channel lacks.
    """
    m, total, acc, rest = state
    PARTS: tl.constexpr = parts_of(FORMAT)
    halfwords = _codes(page, PARTS, 1, FORMAT)
    m, alpha, weights = rescaled(scores, m)
    total = total * alpha + tl.sum(weights, 1)
    acc = acc * alpha[:, None]
    if FORMAT.kind == "affine" or FORMAT.kind == "nibbles":
        scale, middle = _params(page, token_order(FORMAT), FORMAT)
        rounded, scaled = nearest16(weights * scale[None, :])
        rest = rest * alpha + tl.sum(weights * middle[None, :] - rounded * _middle(FORMAT), 1)
    elif FORMAT.kind == "codebook":
        scale = from_scale8(tl.load(page + FORMAT.params_at + token_order(FORMAT)))
        scaled = convert(weights * scale[None, :], tl.bfloat16)
    elif FORMAT.kind == "float8":
        scaled = convert(weights * page_scale(page, FORMAT), tl.bfloat16)
    else:
        scaled = convert(weights, tl.bfloat16)
    for i in tl.static_range(PARTS):
        acc = product(part(scaled, i, PARTS), _units(halfwords, i, PARTS, FORMAT), acc)
    return m, total, acc, rest


@triton.jit
def _ordered(x, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    if PARTS <= 1:
        return x
    else:
        x = tl.reshape(x, [x.shape[0], BLOCK // (2 * PARTS), PARTS // 2, 2, 2])
        return tl.reshape(tl.permute(x, (0, 4, 2, 1, 3)), [x.shape[0], BLOCK])


@triton.jit
def in_order(x, VALUES: tl.constexpr):
    """Columns of ``x`` ``[m, 64]``, a token each, in the order of :func:`token_order`."""
    return _ordered(x, parts_of(VALUES), _TOKENS)


@triton.jit
def ordered_channels(x, KEYS: tl.constexpr):
    """Columns of ``x`` ``[m, dim_block]``, a channel each, part after part."""
    return _ordered(x, parts_of(KEYS), KEYS.dim_block)
