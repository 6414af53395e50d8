"""Formats with super-blocks: eight groups of 32 whose scales are small integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.weights.base import GROUP, WeightFormat, halves


@dataclass(frozen=True)
class SuperMin(WeightFormat):
    """``d * scale * code - dmin * min``: scales and minima of 6 bits a group, codes of ``width`` bits, 4 or 5."""

    width: int = 4

    def _decode(self, blocks: Tensor) -> Tensor:
        scales, mins = _six_bits(blocks[:, 4:16])
        scale = (halves(blocks, 0) * scales).unsqueeze(-1)
        least = (halves(blocks, 2) * mins).unsqueeze(-1)
        return (scale * self._read(blocks) - least).flatten(1)

    def _read(self, blocks: Tensor) -> Tensor:
        """Codes ``float32 [blocks, 8, 32]``."""
        low = blocks[:, 16 if self.width == 4 else 48 :].unflatten(1, (4, GROUP))
        codes = torch.stack([low & 15, low >> 4], dim=2).flatten(1, 2)
        if self.width == 5:
            high = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]
            codes = codes | (high & 1) << 4
        return codes.float()


@dataclass(frozen=True)
class SuperHalves(WeightFormat):
    """``d * scale * (code - 32)``: codes of 6 bits, a signed scale of 8 bits for each half of a group."""

    def _decode(self, blocks: Tensor) -> Tensor:
        low, high = blocks[:, :128].unflatten(1, (2, 2, GROUP)), blocks[:, 128:192].unflatten(1, (2, GROUP))
        nibbles = torch.cat([low & 15, low >> 4], dim=2)  # [blocks, 2, 4, 32]
        top = high.unsqueeze(2) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
        codes = (nibbles | top << 4).float().sub(32).reshape(len(blocks), 16, GROUP // 2)
        scale = halves(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
        values: Tensor = scale.unsqueeze(-1) * codes
        return values.flatten(1)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima ``float32 [blocks, 8]`` out of 12 bytes."""
    a, b, c = packed.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([a & 63, (c & 15) | (a >> 6 << 4)], dim=1)
    mins = torch.cat([b & 63, (c >> 4) | (b >> 6 << 4)], dim=1)
    return scales.float(), mins.float()
