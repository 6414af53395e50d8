"""The unit: how a row of weights becomes bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Inputs whose weights share a scale."""


@dataclass(frozen=True)
class WeightFormat(ABC):
    """A format whose bytes are those of ggml (layouts: ``ggml-common.h``; bits: ``gguf.quants``).

    ``native_id`` is ggml's number of the type (our own begin at 1000), by which ``csrc/weights`` knows it; ``block`` is
    how many inputs of one output lie together, in ``block_bytes`` bytes.
    """

    name: str
    native_id: int
    block: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits of a weight, scales included."""
        return 8 * self.block_bytes / self.block

    @property
    def rounds_inputs(self) -> bool:
        """Whether the products round their inputs to 8 bits (:func:`kvbits.weights.inputs.round_inputs`)."""
        return True

    def decode(self, rows: Tensor) -> Tensor:
        """``uint8 [out, n * block_bytes]`` to ``float32 [out, n * block]``."""
        assert rows.dtype == torch.uint8, rows.dtype
        return self._decode(rows.reshape(-1, self.block_bytes)).reshape(len(rows), -1)

    def encode(self, weight: Tensor) -> Tensor:
        """``[out, in]`` in any dtype to ``uint8 [out, n * block_bytes]``; zeros fill up the inputs to ``n * block``.

        Raises ``NotImplementedError`` for a format that is only read from files.
        """
        missing = -weight.shape[1] % self.block
        padded = torch.nn.functional.pad(weight.detach(), (0, missing)) if missing else weight.detach()
        return self._encode(padded.reshape(-1, self.block)).reshape(len(weight), -1)

    @abstractmethod
    def _decode(self, blocks: Tensor) -> Tensor:
        """``uint8 [blocks, block_bytes]`` to ``float32 [blocks, block]``."""

    def _encode(self, blocks: Tensor) -> Tensor:
        """``[blocks, block]`` to ``uint8 [blocks, block_bytes]``."""
        raise NotImplementedError(f"{self.name} is only read from files")


def halves(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of every block, ``float32 [blocks, 1]``."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def as_bytes(numbers: Tensor) -> Tensor:
    """``[blocks]`` numbers of two bytes as ``uint8 [blocks, 2]``."""
    return numbers.contiguous().view(torch.uint8).reshape(-1, numbers.element_size())
