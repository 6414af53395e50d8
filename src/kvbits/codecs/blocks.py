"""Value scales for blocks of channels instead of whole tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbits.codecs.affine import Affine
from kvbits.codecs.base import NATIVE_IDS, Codec, PageFormat, Rounding, Side
from kvbits.codecs.packing import quads_multiple


@dataclass(frozen=True)
class Blocks(Codec):
    """Affine codes of ``bits`` bits per token and block of ``block`` (32 or 64) channels.

    Page bytes: one page of :class:`kvbits.codecs.affine.Affine` per token for each block, each with its padding.
    """

    bits: int = 4
    block: int = 32

    @property
    def _inner(self) -> Affine:
        return Affine(self.name, self.bits, per="token")

    def page_bytes(self, dim: int) -> int:
        return dim // self.block * self._inner.page_bytes(self.block)

    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        blocks = []
        for start in range(0, rows.shape[-1], self.block):
            blocks.append(self._inner.encode(rows[..., start : start + self.block], side))
        return torch.cat(blocks, dim=-1)

    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        pages = page.unflatten(-1, (dim // self.block, -1))
        blocks = [self._inner.decode(pages[..., b, :], self.block, side) for b in range(dim // self.block)]
        return torch.cat(blocks, dim=-1)

    @property
    def dim_multiple(self) -> int:
        assert quads_multiple(self.bits) <= self.block
        return self.block

    def page_format(self, dim: int, side: Side) -> PageFormat | None:
        inner = self._inner.page_format(self.block, side)
        return None if side == "key" or inner is None else replace(inner, kind="blocks", block=self.block, inner=inner)

    @property
    def native_id(self) -> int | None:
        return NATIVE_IDS["blocks"] + self.bits + 2 * (self.block - 32)
