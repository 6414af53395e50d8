"""Formats without super-blocks: bfloat16, and groups of 32 with a float16 scale and perhaps a minimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.weights.base import GROUP, WeightFormat, as_bytes, halves

_SEARCH = torch.linspace(0.8, 1.1, 13)
"""Factors of the scale that reaches the largest weight; the one with the least squared error is taken."""


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

    def _encode(self, blocks: Tensor) -> Tensor:
        wide = blocks.float()
        scale = (wide.abs().amax(dim=1, keepdim=True) / 127).half()
        codes = _codes(wide, scale.float(), -127, 127).to(torch.int8)
        return torch.cat([as_bytes(scale), codes.view(torch.uint8)], dim=1)


@dataclass(frozen=True)
class Group(WeightFormat):
    """``scale * code`` (with half of the codes below zero) or, ``with_min``, ``scale * code + min``; codes of ``width``
    bits, 4 or 5."""

    width: int = 4
    with_min: bool = False

    def _decode(self, blocks: Tensor) -> Tensor:
        codes = self._read(blocks)
        scale = halves(blocks, 0)
        return scale * codes + halves(blocks, 2) if self.with_min else scale * (codes - (1 << self.width - 1))

    def _read(self, blocks: Tensor) -> Tensor:
        at = 4 if self.with_min else 2
        high = 0 if self.width == 4 else 4
        nibbles = blocks[:, at + high :]
        codes = torch.cat([nibbles & 15, nibbles >> 4], dim=1)
        if high:
            bits = blocks[:, at : at + 4].repeat_interleave(8, dim=1) >> torch.arange(8, dtype=torch.uint8).repeat(4)
            codes = codes | (bits & 1) << 4
        return codes.float()

    def _encode(self, blocks: Tensor) -> Tensor:
        """Without minimum, 4 bits: of several scales the one with the least squared error. The largest weight gets the
        code that has no opposite, as in ggml."""
        if self.with_min or self.width != 4:
            return super()._encode(blocks)
        wide = blocks.float()
        largest = wide.gather(1, wide.abs().argmax(dim=1, keepdim=True))
        best, least = torch.zeros_like(largest), torch.full_like(largest, float("inf"))
        for factor in _SEARCH.tolist():
            scale = (largest / -8 * factor).half().float()
            error = (wide - scale * _codes(wide, scale, -8, 7)).square().sum(dim=1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        codes = (_codes(wide, best, -8, 7) + 8).to(torch.uint8)
        return torch.cat([as_bytes(best.half()), codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4], dim=1)


def _codes(wide: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """Nearest codes; 0 where the scale is."""
    return torch.where(scale == 0, 0.0, wide / scale).round().clamp(least, most)
