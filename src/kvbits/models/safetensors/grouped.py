"""From codes as checkpoints carry them to the blocks of the formats that the kernels multiply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbits.errors import UnsupportedError
from kvbits.models.safetensors.codes import Coded
from kvbits.weights import FORMATS, WeightFormat
from kvbits.weights.base import GROUP

_LOSS, _TINY = 2.0**-11, 2.0**-25
"""What rounding to float16 may take from a scale: a part of it, and where it is tiny half of the smallest number. One
of 16 bits loses nothing from 8e-6 on."""


@dataclass(frozen=True)
class Grouped:
    """A weight whose blocks are made when they are asked for. A group of more than 32 inputs repeats its scale."""

    weight_format: WeightFormat
    coded: Coded

    @property
    def shape(self) -> tuple[int, int]:
        return self.coded.shape

    def blocks(self, first: int, last: int) -> Tensor:
        """``uint8 [last - first, bytes]`` of some outputs, both multiples of 32 or the end."""
        coded, made = self.coded, self.weight_format
        codes, missing = coded.codes(first, last), -coded.shape[1] % GROUP
        codes = torch.nn.functional.pad(codes, (0, missing)).reshape(-1, GROUP)
        parts = [self._spread(coded.scales[first:last])]
        if not isinstance(coded.zeros, int) and made.name in ("uint4", "uint8"):
            parts.append(self._spread(coded.zeros[first:last]))
        joined: Any = made
        blocks: Tensor = joined.join(codes, *parts)
        return blocks.reshape(last - first, -1)

    def values(self, first: int, last: int) -> Tensor:
        """``float32 [last - first, in]``, any outputs: exactly what the blocks say."""
        begin = first // GROUP * GROUP
        blocks = self.blocks(begin, min(-(-last // GROUP) * GROUP, self.shape[0]))
        return self.weight_format.decode(blocks[first - begin : last - begin])[:, : self.shape[1]]

    def _spread(self, numbers: Tensor) -> Tensor:
        """A number a group to a number a block, ``float16 [blocks, 1]``."""
        times, count = -(-self.coded.group // GROUP), -(-self.shape[1] // GROUP)
        return numbers.half().repeat_interleave(times, dim=1)[:, :count].reshape(-1, 1)


def grouped(coded: Coded) -> Grouped:
    """``coded`` in the smallest format that holds it.

    Raises ``UnsupportedError`` for groups that 32 inputs do not divide, or scales that float16 does not hold.
    """
    if coded.group % GROUP and coded.scales.shape[1] > 1:
        raise UnsupportedError(f"{coded.name} has groups of {coded.group} inputs; kvbits reads multiples of {GROUP}")
    scales = coded.scales.float()
    if not ((scales.half().float() - scales).abs() <= _LOSS * scales.abs() + _TINY).all():
        raise UnsupportedError(f"{coded.name} has scales that float16 does not hold")
    middle = 1 << (coded.bits - 1)
    plain = coded.zeros == middle if isinstance(coded.zeros, int) else bool((coded.zeros == middle).all())
    names = {4: ("uint4", "q4_0"), 8: ("uint8", "q8_0")}[coded.bits]
    return Grouped(FORMATS[names[plain]], coded)
