"""8-bit floating point with one scale per page and head: what other engines call an fp8 cache.

The two formats are those of the OCP 8-bit floating point specification (Micikevicius et al., 2022, arXiv:2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.codecs.affine import numbers_of
from kvbits.codecs.base import NATIVE_IDS, Codec, PageFormat, Rounding, Side, pack_side, unpack_side
from kvbits.codecs.packing import packed_bytes
from kvbits.config import PAGE_TOKENS, align


@dataclass(frozen=True)
class Float8(Codec):
    """``scale * f``, ``f`` a float of 4 exponent and 3 mantissa bits (``mantissa`` 3) or of 5 and 2 (``mantissa`` 2).

    The page's largest element becomes the largest finite ``f``, 448 or 57,344. Page bytes: floats as 8-bit codes
    (:func:`kvbits.codecs.packing.pack`), the scale ``float32``, padding.
    """

    mantissa: int = 3

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.mantissa == 3 else torch.float8_e5m2

    def page_bytes(self, dim: int) -> int:
        return align(PAGE_TOKENS * dim + 4)

    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        largest = torch.finfo(self._dtype).max
        rows, broken = numbers_of(rows, (-2, -1))
        scale = rows.abs().amax((-2, -1)) / largest
        # no reciprocal where it would overflow: such a page is nothing but zeros to bfloat16's neighbours
        inverse = torch.where(scale > 2.0**-126, 1 / scale, torch.zeros_like(scale))
        floats = (rows * inverse[..., None, None]).clamp(-largest, largest).to(self._dtype).view(torch.uint8)
        scale = scale.masked_fill(broken, torch.nan).unsqueeze(-1)
        return self._page([pack_side(floats, 8, side), scale], rows.shape[-1])

    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        size = packed_bytes(dim, 8)
        floats = unpack_side(page, 8, dim, side).contiguous().view(self._dtype).float()
        scale = page[..., size : size + 4].contiguous().view(torch.float32).unsqueeze(-1)
        return floats * scale

    def page_format(self, dim: int, side: Side) -> PageFormat | None:
        return PageFormat("float8", self.mantissa, packed_bytes(dim, 8))

    @property
    def candidate(self) -> bool:
        return False  # int8 is finer in as many bytes

    @property
    def native_id(self) -> int | None:
        return NATIVE_IDS["float8"] + self.mantissa
