"""Key channels of two widths: the quarter that matters most at more bits, the rest at fewer.

A few key channels carry most of what queries meet (KIVI: Liu et al., 2024, arXiv:2402.02750). Which ones they are is a
page's own affair: it says so in its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbits.codecs.affine import Affine, numbers_of
from kvbits.codecs.base import NATIVE_IDS, Codec, PageFormat, Rounding, Side
from kvbits.codecs.packing import quads_multiple
from kvbits.config import align


@dataclass(frozen=True)
class Mixed(Codec):
    """Keys, affine per channel: ``high`` bits for a quarter of the channels, ``low`` bits for the others.

    The quarter is the first of :attr:`kvbits.codecs.Rounding.order` where that was calibrated, else the channels whose
    range in the page is largest (the lower channel of equals). Page bytes: the channels in the order in which they are
    stored ``uint8 [dim]``, padding, the quarter as a page of :class:`kvbits.codecs.affine.Affine`, the others likewise.
    """

    high: int = 8
    low: int = 4

    orders_channels: ClassVar[bool] = True

    def _parts(self, dim: int) -> tuple[tuple[Affine, int], tuple[Affine, int]]:
        first = dim // 4
        return (
            (Affine(self.name, self.high, per="channel"), first),
            (Affine(self.name, self.low, per="channel"), dim - first),
        )

    def page_bytes(self, dim: int) -> int:
        return align(dim) + sum(codec.page_bytes(size) for codec, size in self._parts(dim))

    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        dim = rows.shape[-1]
        order = self._order(rows, rounding or Rounding())
        rows = rows.gather(-1, order.unsqueeze(-2).expand_as(rows))
        channels = torch.nn.functional.pad(order.to(torch.uint8), (0, align(dim) - dim))
        parts, start = [channels], 0
        for codec, size in self._parts(dim):
            parts.append(codec.encode(rows[..., start : start + size], side))
            start += size
        return torch.cat(parts, dim=-1)

    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        order = page[..., :dim].long()
        parts, start = [], align(dim)
        for codec, size in self._parts(dim):
            parts.append(codec.decode(page[..., start : start + codec.page_bytes(size)], size, side))
            start += codec.page_bytes(size)
        rows = torch.cat(parts, dim=-1)
        return torch.empty_like(rows).scatter_(-1, order.unsqueeze(-2).expand_as(rows), rows)

    def _order(self, rows: Tensor, rounding: Rounding) -> Tensor:
        """Stored channels ``int64 [..., dim]``."""
        if rounding.order is not None:
            return rounding.order.long().expand(*rows.shape[:-2], rows.shape[-1])
        rows, _ = numbers_of(rows, -2)
        reach = rows.amax(-2) - rows.amin(-2)
        return reach.argsort(dim=-1, descending=True, stable=True)

    @property
    def dim_multiple(self) -> int:
        # a quarter must fill the widest vectors, the rest its planes
        return 4 * max(16, quads_multiple(self.low))

    def supports(self, dim: int) -> str | None:
        if dim > 256:
            return f"head size {dim} is over 256, the channels that a byte can name"
        return super().supports(dim)

    def page_format(self, dim: int, side: Side) -> PageFormat | None:
        if side == "value":
            return None
        (wide, first), _ = self._parts(dim)
        first_at = align(dim)
        return PageFormat(
            "mixed",
            self.high,
            per="channel",
            low_bits=self.low,
            first=first,
            first_at=first_at,
            second_at=first_at + wide.page_bytes(first),
        )

    @property
    def native_id(self) -> int | None:
        return NATIVE_IDS["mixed"] + 16 * self.high + self.low
