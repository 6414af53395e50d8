"""Which code an element gets (:func:`kvbits.codecs.affine.choose_codes`): to nearest, or with error feedback."""

import triton
import triton.language as tl

from kvbits.codecs.codebook import ENTRIES
from kvbits.kernels.triton.numbers import clamp, rint


@triton.constexpr_function
def border(bits: int, index: int) -> float:
    """Between the entries ``index`` and ``index + 1`` of a codebook."""
    return (ENTRIES[bits][index] + ENTRIES[bits][index + 1]) / 2


@triton.constexpr_function
def magnitudes(bits: int) -> int:
    """The positive entries of a codebook, a byte each, the least one lowest."""
    entries = ENTRIES[bits][len(ENTRIES[bits]) // 2 :]
    return sum(entry << (8 * i) for i, entry in enumerate(entries))


@triton.jit
def entry(code, BITS: tl.constexpr):
    """What ``int32`` codes of a codebook mean, ``float32``."""
    half: tl.constexpr = 1 << (BITS - 1)
    index = tl.where(code < half, half - 1 - code, code - half)
    table = tl.full(code.shape, magnitudes(BITS), tl.uint64)
    size = ((table >> (8 * index).to(tl.uint64)) & 0xFF).to(tl.int32)
    return tl.where(code < half, -size, size).to(tl.float32)


@triton.jit
def _nearest(x, low, high, FORMAT: tl.constexpr):
    """The code, as ``float32``, for a number in units of its scale."""
    if FORMAT.kind == "codebook":
        code = tl.zeros(x.shape, tl.float32)
        for i in tl.static_range((1 << FORMAT.bits) - 1):
            # NaN, where feedback overflows, is the largest, as it is for torch.bucketize
            code += 1.0 - (x <= border(FORMAT.bits, i)).to(tl.float32)
        return code
    else:
        return rint(tl.where(x == x, clamp(x, low, high), low))  # and here the least


@triton.jit
def _meaning(code, FORMAT: tl.constexpr):
    if FORMAT.kind == "codebook":
        return entry(code.to(tl.int32), FORMAT.bits)
    else:
        return code


@triton.jit
def _spread(params, FORMAT: tl.constexpr):
    """Parameters of rows or lanes, as a matrix."""
    shape: tl.constexpr = [FORMAT.row_block, FORMAT.lane_block]
    if FORMAT.per_row:
        return tl.broadcast_to(params[:, None], shape)
    else:
        return tl.broadcast_to(params[None, :], shape)


@triton.jit
def choose(x, scale, zero, inverse, low, high, feedback, order, rank, FORMAT: tl.constexpr):
    """Codes ``float32`` of ``x`` ``[row_block, lane_block]``; ``scale``, ``zero``, ``inverse``: of rows or of lanes.

    ``feedback`` (``None`` for none) points to the head's ``[dim, dim]`` factors, ``order`` to the channels in the order
    in which they are rounded (``None``: as they come), ``rank`` to when each channel's turn is.
    """
    inverse = _spread(inverse, FORMAT)
    scale = _spread(scale, FORMAT)
    zero = _spread(zero, FORMAT)
    if feedback is None:
        return _nearest((x - zero) * inverse, low, high, FORMAT)
    else:
        axis: tl.constexpr = 0 if FORMAT.key else 1
        channel = tl.arange(0, FORMAT.dim_block)
        inside = channel < FORMAT.dim
        turn = channel
        if rank is not None:
            turn = tl.load(rank + channel, mask=inside, other=0)
        codes = tl.zeros(x.shape, tl.float32)
        for step in range(FORMAT.dim):
            current = tl.expand_dims(turn == step, 1 - axis) & tl.expand_dims(inside, 1 - axis)
            # a sum with one element that is not 0
            own = tl.sum(tl.where(current, x, 0.0), axis)
            own_scale = tl.sum(tl.where(current, scale, 0.0), axis)
            own_zero = tl.sum(tl.where(current, zero, 0.0), axis)
            own_inverse = tl.sum(tl.where(current, inverse, 0.0), axis)
            code = _nearest((own - own_zero) * own_inverse, low, high, FORMAT)
            error = own - (_meaning(code, FORMAT) * own_scale + own_zero)
            factor = tl.load(feedback + step * FORMAT.dim + turn, mask=inside & (turn > step), other=0.0)
            x = x - tl.expand_dims(error, axis) * tl.expand_dims(factor, 1 - axis)
            codes = tl.where(current, tl.expand_dims(code, axis), codes)
        return codes
