"""Formats without super-blocks: bfloat16, and groups of 32 with a float16 scale and perhaps a minimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.weights.base import GROUP, WeightFormat, as_bytes, halves

SEARCH = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8)
"""Parts of a group's range that 4 bits may span; the one with the least squared error is taken."""


@dataclass(frozen=True)
class Bf16(WeightFormat):
    """As they are."""

    @property
    def rounds_inputs(self) -> bool:
        return False

    def _decode(self, blocks: Tensor) -> Tensor:
        return blocks.contiguous().view(torch.bfloat16).float()

    def _encode(self, blocks: Tensor) -> Tensor:
        return blocks.to(torch.bfloat16).contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Group8(WeightFormat):
    """``scale * code``, codes of 8 bits with a sign."""

    def _decode(self, blocks: Tensor) -> Tensor:
        return halves(blocks, 0) * blocks[:, 2:].view(torch.int8).float()

    def join(self, codes: Tensor, scale: Tensor) -> Tensor:
        """As :meth:`Group.join`; codes from 0 on, of which 128 means 0."""
        return torch.cat([as_bytes(scale.half()), codes ^ 128], dim=1)


@dataclass(frozen=True)
class Group(WeightFormat):
    """``scale * code`` (with half of the codes below zero), ``with_min``, ``scale * code + min``, or, ``with_zero``,
    ``scale * (code - zero)``; codes of ``width`` bits, 4, 5 or (with a minimum or a zero) 8."""

    width: int = 4
    with_min: bool = False
    with_zero: bool = False

    def _decode(self, blocks: Tensor) -> Tensor:
        codes = self._read(blocks)
        scale = halves(blocks, 0)
        if self.with_min:
            return scale * codes + halves(blocks, 2)
        return scale * (codes - (halves(blocks, 2) if self.with_zero else 1 << self.width - 1))

    def join(self, codes: Tensor, scale: Tensor, second: Tensor | None = None) -> Tensor:
        """Blocks ``uint8 [blocks, block_bytes]`` of codes ``uint8 [blocks, 32]`` of 4 or 8 bits, their scale and their
        minimum or zero point, ``[blocks, 1]``, which float16 has to hold."""
        assert (second is not None) == (self.with_min or self.with_zero), self
        packed = codes if self.width == 8 else codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4
        return torch.cat([*(as_bytes(x.half()) for x in (scale, second) if x is not None), packed], dim=1)

    def _read(self, blocks: Tensor) -> Tensor:
        at = 4 if self.with_min or self.with_zero else 2
        if self.width == 8:
            return blocks[:, at:].float()
        high = 0 if self.width == 4 else 4
        nibbles = blocks[:, at + high :]
        codes = torch.cat([nibbles & 15, nibbles >> 4], dim=1)
        if high:
            bits = blocks[:, at : at + 4].repeat_interleave(8, dim=1) >> torch.arange(8, dtype=torch.uint8).repeat(4)
            codes = codes | (bits & 1) << 4
        return codes.float()

    def _encode(self, blocks: Tensor) -> Tensor:
        """With a minimum, and 4 or 8 bits. Of several ranges in 4 bits the one with the least squared error."""
        if not self.with_min or self.width == 5:
            return super()._encode(blocks)
        wide = blocks.float()
        low, high = wide.amin(dim=1, keepdim=True), wide.amax(dim=1, keepdim=True)
        best: tuple[Tensor, Tensor, Tensor] | None = None
        least = torch.full_like(low, float("inf"))
        for part in SEARCH if self.width == 4 else (1.0,):
            cut = (high - low) * (1 - part) / 2
            tried = self._round(wide, low + cut, high - cut)
            scale, bottom, codes = tried
            error = (wide - scale.float() * codes - bottom.float()).square().sum(dim=1, keepdim=True)
            if best is None:
                best = tried
            else:
                best = tuple(torch.where(error < least, new, old) for new, old in zip(tried, best, strict=True))  # type: ignore[assignment]
            least = torch.minimum(error, least)
        assert best is not None
        return self.join(best[2].to(torch.uint8), best[0], best[1])

    def _round(self, wide: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and minimum as float16, and codes."""
        most = (1 << self.width) - 1
        scale, bottom = ((high - low) / most).half(), low.half()
        step = scale.float()
        codes = torch.where(step == 0, 0.0, (wide - bottom.float()) / step).round().clamp(0, most)
        return scale, bottom, codes
