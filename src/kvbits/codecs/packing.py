"""How small integers lie in bytes, in torch: the slow, obvious side of ``csrc/codecs/planes-inl.h``.

A page of one head is a matrix ``[reduction, lanes]``: for keys the channels are reduced and the tokens are lanes, for
values the tokens are reduced and the channels are lanes. A kernel's dot product eats four reduced elements per lane
at once (one 32-bit lane of ``vpdpbusd``), so codes are stored quad by quad: byte ``[q, lane, i]`` belongs to reduced
element ``4 q + i``. A code of ``b`` bits is cut into *planes* of 8, 4, 2 or 1 bits, low bits first in the widest
plane. A plane of ``w`` bits keeps ``8 / w`` quads in one byte: bits ``w j .. w j + w - 1`` of byte ``[g, lane, i]``
belong to quad ``(8 / w) g + j``. So one aligned load holds ``8 / w`` vectors that a shift and a mask separate, at any
vector width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbits.config import PAGE_TOKENS

PLANES: dict[int, tuple[int, ...]] = {bits: tuple(w for w in (8, 4, 2, 1) if bits & w) for bits in range(1, 9)}
"""Bits of a code -> widths of its planes, powers of two: the one with the lowest bits, which is the widest, first."""


def packed_bytes(dim: int, bits: int) -> int:
    """Bytes of the packed codes of one head's page."""
    return PAGE_TOKENS * dim * bits // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``uint8 [..., reduction, lanes]`` with values below ``2**bits`` into ``uint8 [..., bytes]``."""
    *batch, reduction, lanes = codes.shape
    parts = []
    shift = 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        part = (codes >> shift) & ((1 << width) - 1)
        part = part.reshape(*batch, reduction // (4 * per_byte), per_byte, 4, lanes)
        part = part.movedim(-3, -1).transpose(-3, -2)  # [..., groups, lanes, 4, per_byte]
        weights = torch.tensor([1 << (width * j) for j in range(per_byte)], dtype=torch.int32)
        parts.append((part.to(torch.int32) * weights).sum(-1).to(torch.uint8).flatten(-3))
        shift += width
    return torch.cat(parts, dim=-1)


def unpack(packed: Tensor, bits: int, reduction: int, lanes: int) -> Tensor:
    """Undo :func:`pack`: ``uint8 [..., bytes]`` to codes ``uint8 [..., reduction, lanes]``."""
    batch = packed.shape[:-1]
    codes = torch.zeros(*batch, reduction, lanes, dtype=torch.uint8)
    shift = start = 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        size = reduction * lanes * width // 8
        part = packed[..., start : start + size].reshape(*batch, reduction // (4 * per_byte), lanes, 4)
        split = torch.stack([(part >> (width * j)) & ((1 << width) - 1) for j in range(per_byte)], dim=-3)
        # [..., groups, per_byte, lanes, 4] -> [..., groups, per_byte, 4, lanes]
        codes |= split.transpose(-2, -1).reshape(*batch, reduction, lanes) << shift
        shift += width
        start += size
    return codes


def quads_multiple(bits: int) -> int:
    """The reduced dimension must be a multiple of this many elements."""
    return max(4 * 8 // width for width in PLANES[bits])
