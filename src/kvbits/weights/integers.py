"""Weights as checkpoints of other tools hold them: ``scale * (code - zero)`` with whole zero points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.weights.base import GROUP
from kvbits.weights.plain import SEARCH

_WIDE = (1.0, 1.004)
"""8 bits: the range as it is, or the next larger scale, where rounding the scale itself cut the range."""

_LARGEST = 60000.0
"""Scales are numbers of both bfloat16 and float16, so that every reader has the same."""


@dataclass(frozen=True)
class Integers:
    """A weight ``[out, in]`` in groups of 32 inputs: ``codes`` ``uint8 [out, in]`` of ``bits`` (4 or 8) bits,
    ``scales`` ``bfloat16 [out, in / 32]``, ``zeros`` ``uint8 [out, in / 32]``."""

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """``float32 [out, in]``, exactly what the numbers say."""
        groups = self.codes.unflatten(1, (-1, GROUP)).float() - self.zeros.unsqueeze(2).float()
        values: Tensor = (groups * self.scales.unsqueeze(2).float()).flatten(1)
        return values

    def rows(self, first: int, last: int) -> Integers:
        """Some of the outputs."""
        return Integers(self.bits, *(part[first:last] for part in (self.codes, self.scales, self.zeros)))


def fit_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points for ``float32 [in, out]``, ``float32 [in / 32, out]`` each, that :class:`Integers` holds.

    A group's range includes 0, so that its zero point is a code. In 4 bits the codes may span a part of it only; of
    several parts, the one with the least squared error is taken.
    """
    groups, most = weight.unflatten(0, (-1, GROUP)), (1 << bits) - 1
    low, high = groups.amin(dim=1).clamp(max=0), groups.amax(dim=1).clamp(min=0)
    best, least = (torch.ones_like(low), torch.zeros_like(low)), torch.full_like(low, float("inf"))
    for part in SEARCH if bits == 4 else _WIDE:
        scale = ((high - low) * (part / most)).clamp(max=_LARGEST).half().bfloat16().float()
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-low * part / scale).round().clamp(0, most)
        wide, base = scale.unsqueeze(1), zero.unsqueeze(1)
        found = round_to_grid(groups, wide, base, bits).sub_(base).mul_(wide)
        error = found.sub_(groups).square_().sum(dim=1)
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.where(better, error, least)
    return best


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes ``float32 [..., out]``; ``scale`` and ``zero`` broadcast to ``weight``."""
    return (weight / scale + zero).round_().clamp_(0, (1 << bits) - 1)


def joined(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Integers:
    """Codes ``float32 [in, out]`` on the grid of :func:`fit_grid` as a weight."""
    return Integers(
        bits,
        codes.T.to(torch.uint8).contiguous(),
        scale.T.to(torch.bfloat16).contiguous(),
        zero.T.to(torch.uint8).contiguous(),
    )


def nearest(weight: Tensor, bits: int) -> Integers:
    """``float32 [out, in]`` rounded weight by weight."""
    turned = weight.T.contiguous()
    scale, zero = fit_grid(turned, bits)
    wide, base = (part.repeat_interleave(GROUP, dim=0) for part in (scale, zero))
    return joined(round_to_grid(turned, wide, base, bits), scale, zero, bits)
