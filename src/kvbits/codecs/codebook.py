"""Codebook codes of rotated heads: ``x = rotate(scale * entry(code)) + center``.

A Hadamard rotation spreads outlying channels over all, so that what is coded is close to normal, and the entries are
those of least squared error for 64 normal numbers whose largest is known (Lloyd, 1982, and Max, 1960; a codebook for
blocks scaled by their largest element is NF4's idea: Dettmers et al., 2023, arXiv:2305.14314). Before the rotation each
key channel loses the middle of its range in the page, which is where RoPE models keep most of a key's energy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.codecs.affine import choose_codes, numbers_of, to_half
from kvbits.codecs.base import NATIVE_IDS, Codec, PageFormat, Rounding, Side, pack_side, unpack_side
from kvbits.codecs.hadamard import block_size, rotate
from kvbits.codecs.packing import packed_bytes, quads_multiple
from kvbits.codecs.scale8 import NAN, from_scale8, to_scale8
from kvbits.config import PAGE_TOKENS, align

REACH = {4: 55, 3: 52, 2: 46}
"""Bits -> by what a token's largest element is divided to give its scale.

63 has the least squared error; with less, the large elements, which attention feels most, are cut off less.
"""

ENTRIES: dict[int, tuple[int, ...]] = {
    4: (-60, -47, -37, -28, -21, -15, -9, -3, 3, 9, 15, 21, 28, 37, 47, 60),
    3: (-52, -32, -18, -6, 6, 18, 32, 52),
    2: (-37, -11, 11, 37),
}
"""Bits -> what the codes mean, in units of the scale: small integers, for the kernels' byte products."""

ROTATED_MOST = 2.0**96
"""What is larger is coded as this: the rotation's sums must not overflow, and no scale reaches as far."""


@dataclass(frozen=True)
class Codebook(Codec):
    """``bits``-bit indices into :data:`ENTRIES`, one scale per token; heads are rotated.

    ``centered`` heads (keys) also store the middle of every channel's range in the page, which is taken out before the
    rotation. :attr:`kvbits.codecs.Rounding.clip` multiplies the scales; more than 1 may serve.

    Page bytes: codes (:func:`kvbits.codecs.packing.pack`), scales ``uint8 [64]``
    (:func:`kvbits.codecs.scale8.to_scale8`), centers ``float16 [dim]`` where centered, padding.
    """

    bits: int = 4
    centered: bool = False

    def page_bytes(self, dim: int) -> int:
        return align(packed_bytes(dim, self.bits) + PAGE_TOKENS + (2 * dim if self.centered else 0))

    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        params = []
        rows, broken = numbers_of(rows, -1)
        if self.centered:
            center = to_half((rows.amin(-2) + rows.amax(-2)) * 0.5)
            params.append(center)
            rows = rows - center.float().unsqueeze(-2)
        rows = rotate(rows.clamp(-ROTATED_MOST, ROTATED_MOST))
        rounding = rounding or Rounding()
        most = rows.abs().amax(-1)
        if rounding.clip is not None:
            most = most * rounding.clip.unsqueeze(-1)
        byte, scale = to_scale8(most / REACH[self.bits])
        entries = torch.tensor(ENTRIES[self.bits], dtype=torch.float32)
        borders = (entries[1:] + entries[:-1]) / 2
        codes = choose_codes(
            rows,
            scale,
            torch.zeros_like(scale),
            -1,
            lambda x: torch.bucketize(x.contiguous(), borders).float(),
            lambda code: entries[code.long()],
            rounding,
        ).to(torch.uint8)
        byte = byte.masked_fill(broken, NAN)
        return self._page([pack_side(codes, self.bits, side), byte, *params], rows.shape[-1])

    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        size = packed_bytes(dim, self.bits)
        codes = unpack_side(page, self.bits, dim, side)
        scale = from_scale8(page[..., size : size + PAGE_TOKENS]).unsqueeze(-1)
        rows = rotate(torch.tensor(ENTRIES[self.bits], dtype=torch.float32)[codes.long()] * scale)
        if not self.centered:
            return rows
        center = page[..., size + PAGE_TOKENS : size + PAGE_TOKENS + 2 * dim].contiguous().view(torch.float16).float()
        return rows + center.unsqueeze(-2)

    def to_basis(self, rows: Tensor) -> Tensor:
        return rotate(rows)

    @property
    def fits_range(self) -> bool:
        return True

    @property
    def dim_multiple(self) -> int:
        return max(16, quads_multiple(self.bits))

    def page_format(self, dim: int, side: Side) -> PageFormat | None:
        params_at, rotated = packed_bytes(dim, self.bits), block_size(dim)
        return PageFormat("codebook", self.bits, params_at, "token", centered=self.centered, rotate=rotated)

    @property
    def native_id(self) -> int | None:
        return NATIVE_IDS["codebook"] + self.bits + 16 * self.centered
