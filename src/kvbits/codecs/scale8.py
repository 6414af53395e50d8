"""Scales of one byte."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbits.codecs.affine import to_half

NAN = 252
"""The byte of a scale that is NaN."""


def to_scale8(scale: Tensor, up: bool = False) -> tuple[Tensor, Tensor]:
    """A positive scale as one byte ``uint8`` and what the byte means, ``float32``.

    The byte is a float16 without its sign and its last seven bits, to nearest, or rounded ``up`` where codes must reach
    as far as the scale was made for; at most 61440. NaN stays NaN.
    """
    bits = to_half(scale).contiguous().view(torch.int16).to(torch.int32)
    byte = ((bits + (127 if up else 64)) >> 7).clamp(max=247).to(torch.uint8)
    byte = byte.masked_fill(scale.isnan(), NAN)
    return byte, from_scale8(byte)


def from_scale8(byte: Tensor) -> Tensor:
    """What :func:`to_scale8` stored, ``float32``."""
    return (byte.to(torch.int32) << 7).to(torch.int16).view(torch.float16).float()
