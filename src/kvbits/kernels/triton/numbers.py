"""Rounding as the page formats define it, to the last bit: no division or product here may be approximate or fused."""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""numpy has no bfloat16: where Triton interprets, it is converted by bits, and products are those of float32 copies."""

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: a sum with it has no bits behind the point
_HALF_MAX = tl.constexpr(65504.0)


@triton.jit
def rint(x):
    """To the nearest integer, halves to even; ``|x|`` below 2**22."""
    return (x + _ROUND) - _ROUND


@triton.jit
def widen(x):
    """``bfloat16`` as ``float32``."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def convert(x, TYPE: tl.constexpr):
    """``float32`` or ``bfloat16`` numbers in another of these types, to nearest, halves to even."""
    if x.dtype == TYPE:
        return x
    elif tl.float32 == TYPE:
        return widen(x)
    elif INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def nearest16(x):
    """``float32`` numbers rounded to what ``bfloat16`` holds, halves away from 0; and those in ``bfloat16``."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True), (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def clamp(x, low, high):
    """``x`` between two numbers."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def to_half(x):
    """Round to float16; what is beyond its range becomes its largest number. Zero has no sign."""
    half = clamp(x, -_HALF_MAX, _HALF_MAX).to(tl.float16)
    return tl.where(half == 0.0, tl.zeros(half.shape, tl.float16), half)


@triton.jit
def numbers_of(x, AXIS: tl.constexpr):
    """``x`` with 0 for NaN and infinities, and which groups along ``AXIS`` had any: their scales become NaN."""
    finite = tl.abs(x) < float("inf")
    return tl.where(finite, x, 0.0), tl.max(tl.where(finite, 0, 1), AXIS) > 0


@triton.jit
def broken_half(scale, broken):
    """``float16`` scales, NaN where ``broken``."""
    nan = tl.full(scale.shape, 0x7E00, tl.int16).to(tl.float16, bitcast=True)
    return tl.where(broken, nan, scale)


@triton.jit
def reciprocal(scale):
    """``1 / scale``, 0 for 0."""
    positive = scale > 0
    return tl.where(positive, tl.math.div_rn(1.0, tl.where(positive, scale, 1.0)), 0.0)


@triton.jit
def to_scale8(scale, UP: tl.constexpr):
    """A scale as one byte, ``int32``: float16 without its sign and its last seven bits, to nearest or up."""
    bits = to_half(scale).to(tl.int16, bitcast=True).to(tl.int32)
    return tl.minimum((bits + (127 if UP else 64)) >> 7, 247)


@triton.jit
def from_scale8(byte):
    """What :func:`to_scale8` stored, ``float32``."""
    return (byte.to(tl.int32) << 7).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def to_float8(x, MANTISSA: tl.constexpr):
    """``x``, within the format's range, as e4m3 (``MANTISSA`` 3) or e5m2 (2), ``int32``; halves to even."""
    bits = x.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    cut: tl.constexpr = 23 - MANTISSA
    bias: tl.constexpr = 127 - (7 if MANTISSA == 3 else 15)
    normal = ((size + ((1 << (cut - 1)) - 1) + ((size >> cut) & 1)) >> cut) - (bias << MANTISSA)
    # below 2**-6 (e4m3) and 2**-14 (e5m2) the steps are those of the least normal numbers
    steps: tl.constexpr = 512.0 if MANTISSA == 3 else 65536.0
    least: tl.constexpr = 0.015625 if MANTISSA == 3 else 0.00006103515625
    magnitude = tl.abs(x)
    small = rint(tl.minimum(magnitude, least) * steps).to(tl.int32)
    return sign | tl.where(magnitude < least, small, normal)


@triton.jit
def from_float8(code, MANTISSA: tl.constexpr):
    """What :func:`to_float8` made, ``float32``: its bits are those of a float16, shifted."""
    code = code.to(tl.int32)
    shifted = ((code & 0x80) << 8) | ((code & 0x7F) << (10 - MANTISSA))
    wide = shifted.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return wide * 256.0 if MANTISSA == 3 else wide
