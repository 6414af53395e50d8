"""16-bit storage: the baseline, and the format in which every open page is kept.

Elements are bfloat16 in pairs of the reduced dimension, ``[reduction / 2, lanes, 2]`` (see :mod:`kvbits.codecs.packing`
for what is reduced): the operand order of ``vdpbf16ps``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.codecs.base import NATIVE_IDS, Codec, PageFormat, Rounding, Side
from kvbits.config import PAGE_TOKENS


@dataclass(frozen=True)
class Raw(Codec):
    """bfloat16, rounded to nearest even; no parameters."""

    name: str = "bf16"

    def page_bytes(self, dim: int) -> int:
        return PAGE_TOKENS * dim * 2

    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        matrix = rows.transpose(-1, -2) if side == "key" else rows
        pairs = matrix.to(torch.bfloat16).unflatten(-2, (-1, 2)).transpose(-1, -2)
        page: Tensor = pairs.contiguous().view(torch.uint8).flatten(-3)
        return page

    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        lanes = PAGE_TOKENS if side == "key" else dim
        pairs = page.contiguous().view(torch.bfloat16).unflatten(-1, (-1, lanes, 2))
        matrix: Tensor = pairs.transpose(-1, -2).flatten(-3, -2).float()
        return matrix.transpose(-1, -2) if side == "key" else matrix

    def page_format(self, dim: int, side: Side) -> PageFormat | None:
        return PageFormat("raw", 16)

    @property
    def candidate(self) -> bool:
        return False  # what others are compared with

    @property
    def native_id(self) -> int | None:
        return NATIVE_IDS["raw"]
