"""How far a decoded element may be from what was encoded, from the data alone."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from kvbits.codecs import Codec
from kvbits.codecs.affine import Affine
from kvbits.codecs.blocks import Blocks
from kvbits.codecs.codebook import ENTRIES, REACH, Codebook
from kvbits.codecs.float8 import Float8
from kvbits.codecs.mixed import Mixed
from kvbits.codecs.nibbles import Nibbles
from kvbits.codecs.raw import Raw
from kvbits.config import PAGE_TOKENS

HALF_EPS = 2.0**-11
"""Largest relative error of rounding to float16."""
HALF_TINY = 2.0**-25
"""Largest absolute error of rounding to float16 near zero."""


def rows_like_keys(dim: int, magnitude: float = 1.0, seed: int = 0) -> Tensor:
    """``[2, 64, dim]`` bfloat16 values in float32, with a few channels far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, PAGE_TOKENS, dim, generator=generator)
    rows[..., :: dim // 4] *= 12
    rows[..., 1 :: dim // 4] += 20
    return (rows * magnitude).bfloat16().float()


@singledispatch
def error_bound(codec: Codec, rows: Tensor) -> Tensor:
    """Half a step for every element, from the data alone, plus what rounding the parameters to float16 costs."""
    raise NotImplementedError(f"no bound is known for {codec}")


@error_bound.register
def raw_bound(codec: Raw, rows: Tensor) -> Tensor:
    return rows.abs() * 2.0**-8  # rows are bfloat16 already, so even this is never used up


@error_bound.register
def affine_bound(codec: Affine, rows: Tensor) -> Tensor:
    axis = -1 if codec.per == "token" else -2
    if codec.symmetric:
        steps = 2 ** (codec.bits - 1) - 1
        step = rows.abs().amax(axis, keepdim=True) / steps
        return step * (0.5 + steps * HALF_EPS) + steps * HALF_TINY
    steps = 2**codec.bits - 1
    low, high = rows.amin(axis, keepdim=True), rows.amax(axis, keepdim=True)
    zero_error = low.abs() * HALF_EPS + HALF_TINY
    step = (high - low + zero_error) / steps
    return step * (0.5 + steps * HALF_EPS) + steps * HALF_TINY + zero_error


@error_bound.register
def float8_bound(codec: Float8, rows: Tensor) -> Tensor:
    # half of the last mantissa bit, or half of the least step below the normal numbers
    largest, least = (448, 2.0**-9) if codec.mantissa == 3 else (57344, 2.0**-16)
    scale = rows.abs().amax((-2, -1), keepdim=True) / largest
    return torch.maximum(rows.abs() * 2.0 ** -(codec.mantissa + 1), scale * least / 2) + 2.0**-126


@error_bound.register
def blocks_bound(codec: Blocks, rows: Tensor) -> Tensor:
    inner = Affine("", codec.bits, per="token")
    return torch.cat([error_bound(inner, part).expand_as(part) for part in rows.split(codec.block, -1)], -1)


@error_bound.register
def mixed_bound(codec: Mixed, rows: Tensor) -> Tensor:
    # no channel is coarser than the low codes, but where scales round to nothing the high ones lose more steps
    low, high = (error_bound(Affine("", bits, per="channel"), rows) for bits in (codec.low, codec.high))
    return torch.maximum(low, high)


@error_bound.register
def codebook_bound(codec: Codebook, rows: Tensor) -> Tensor:
    """The rotated error is at most half the widest gap, or what lies beyond the last entry; its length is kept."""
    dim = rows.shape[-1]
    matrix = hadamard_matrix(dim)
    center = 0.0
    if codec.centered:
        low, high = rows.amin(-2, keepdim=True), rows.amax(-2, keepdim=True)
        center = ((low + high) * 0.5).clamp(-65504, 65504).half().float()
    rotated = ((rows - center).double() @ matrix).float()
    entries = torch.tensor(ENTRIES[codec.bits])
    scale = (rotated.abs().amax(-1, keepdim=True) / REACH[codec.bits] * (1 + HALF_EPS) * (1 + 1 / 16)).clamp(
        min=2.0**-17
    )
    # a scale may be a sixteenth too small, too
    widest = max(float((entries[1:] - entries[:-1]).max()) / 2, REACH[codec.bits] * (1 + 1 / 15) - float(entries.max()))
    return scale * widest * dim**0.5 * torch.ones_like(rows)


def hadamard_matrix(dim: int) -> Tensor:
    """Block-diagonal, ``float64 [dim, dim]``, from Sylvester's recursion."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while dim % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / len(block) ** 0.5] * (dim // len(block)))


@error_bound.register
def nibbles_bound(codec: Nibbles, rows: Tensor) -> Tensor:
    """Half a step of at most 1/8 more than the range asks for, and the least scale that a byte can say, 2**-17."""
    axis = -1 if codec.per == "token" else -2
    if codec.symmetric:
        reach, zero_error = rows.abs().amax(axis, keepdim=True) / 127, 0.0
    else:
        low, high = rows.amin(axis, keepdim=True), rows.amax(axis, keepdim=True)
        zero_error = low.abs() * HALF_EPS + HALF_TINY
        reach = (high - low + zero_error) / 255
    # the last: a scale may round to nothing
    return (reach * (1 + HALF_EPS) * 1.125 + 2.0**-17) * 0.5 + zero_error + 255 * HALF_TINY
