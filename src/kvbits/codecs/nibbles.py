"""8-bit codes in two planes of nibbles: all of a page for full accuracy, the high plane alone for a draft of it.

The layout serves self-speculation: a draft step reads half of the bytes, the step that verifies it reads all, and both
read the same page (QuantSpec: Tiwari et al., 2025, arXiv:2502.10424).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbits.codecs.affine import affine_codes, to_half
from kvbits.codecs.base import NATIVE_IDS, Codec, PageFormat, Rounding, Side, pack_side, unpack_side
from kvbits.codecs.packing import packed_bytes
from kvbits.codecs.scale8 import from_scale8, to_scale8
from kvbits.config import PAGE_TOKENS, align

_BIAS = 128
_NIBBLE_MEAN = 7.5


@dataclass(frozen=True)
class Nibbles(Codec):
    """Affine codes ``u`` of 8 bits, ``x = scale * u + zero``, cut into ``u = 16 * high + low``.

    ``per`` names the axis that has its own parameters; symmetric codes have ``zero = -128 * scale``. Scales are one
    byte, rounded up (:func:`kvbits.codecs.scale8.to_scale8`).

    Page bytes: the plane of high nibbles (:func:`kvbits.codecs.packing.pack`), scales ``uint8 [n]``, zeros ``float16
    [n]`` unless symmetric, padding to the cache line, the plane of low nibbles, padding. ``n`` is 64 or ``dim``. A
    draft is ``16 * scale * high + zero + 7.5 * scale``: it needs the bytes up to the first padding only.
    """

    per: Literal["token", "channel"] = "token"
    symmetric: bool = False

    def _params(self, dim: int) -> int:
        return PAGE_TOKENS if self.per == "token" else dim

    def draft_bytes(self, dim: int) -> int:
        """Bytes of a page that a draft reads; the low plane follows them."""
        return align(packed_bytes(dim, 4) + self._params(dim) * (1 if self.symmetric else 3))

    def page_bytes(self, dim: int) -> int:
        return self.draft_bytes(dim) + align(packed_bytes(dim, 4))

    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        axis = -1 if self.per == "token" else -2
        codes, scale, zero = affine_codes(rows, axis, 8, self.symmetric, rounding, lambda x: to_scale8(x, up=True)[1])
        codes = (codes + (_BIAS if self.symmetric else 0)).to(torch.uint8)
        parts = [pack_side(codes >> 4, 4, side), to_scale8(scale)[0]]
        if not self.symmetric:
            parts.append(to_half(zero).contiguous().view(torch.uint8))
        dim = rows.shape[-1]
        first = torch.cat(parts, dim=-1)
        first = torch.nn.functional.pad(first, (0, self.draft_bytes(dim) - first.shape[-1]))
        return self._page([first, pack_side(codes & 15, 4, side)], dim)

    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        high, scale, zero = self._read(page, dim, side)
        low = unpack_side(page[..., self.draft_bytes(dim) :], 4, dim, side).float()
        return (16 * high + low) * scale + zero

    def decode_draft(self, page: Tensor, dim: int, side: Side) -> Tensor:
        high, scale, zero = self._read(page, dim, side)
        return high * (16 * scale) + (zero + _NIBBLE_MEAN * scale)

    def _read(self, page: Tensor, dim: int, side: Side) -> tuple[Tensor, Tensor, Tensor]:
        """High nibbles, scale and zero of every element, from the bytes that a draft reads."""
        axis = -1 if self.per == "token" else -2
        n, start = self._params(dim), packed_bytes(dim, 4)
        high = unpack_side(page, 4, dim, side).float()
        scale = from_scale8(page[..., start : start + n]).unsqueeze(axis)
        if self.symmetric:
            return high, scale, -_BIAS * scale
        zero = page[..., start + n : start + 3 * n].contiguous().view(torch.float16).float().unsqueeze(axis)
        return high, scale, zero

    def page_format(self, dim: int, side: Side) -> PageFormat | None:
        params_at, second_at = packed_bytes(dim, 4), self.draft_bytes(dim)
        return PageFormat("nibbles", 8, params_at, self.per, self.symmetric, second_at=second_at, draft=True)

    @property
    def native_id(self) -> int | None:
        return NATIVE_IDS["nibbles"] + 16 * (self.per == "channel") + 32 * self.symmetric
