"""Where a parameter of the model lies in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from kvbits.models.gguf.header import TensorInfo


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: its ``name``, the ``tensor``, the stored row of each row (``None``: in order) and
    what to add. With a ``group``, as many rows of the tensor and of another one take turns, ``shift`` rows on."""

    name: str
    tensor: TensorInfo
    order: np.ndarray | None = None
    add: float = 0.0
    group: int = 0
    shift: int = 0

    def find(self, row: int) -> tuple[int, int] | None:
        """Which row is the parameter's ``row`` (all dimensions but the last counted together), and how many from there
        on stay neighbours; ``None`` for one of the other tensor's."""
        if not self.group:
            return row, len(self.tensor.rows()) - row
        turn, rest = divmod(row - self.shift, 2 * self.group)
        return (turn * self.group + rest, self.group - rest) if rest < self.group else None

    def values(self, first: int, last: int) -> np.ndarray:
        """Rows of the tensor, in the parameter's order, ``float32``."""
        rows = self.tensor.rows()
        part = rows[first:last] if self.order is None else rows[self.order[first:last]]
        found: np.ndarray = dequantize(part, self.tensor.kind)
        if self.add:
            return found + np.float32(self.add)
        return found if found.flags.writeable else found.copy()

    def release(self, first: int, last: int) -> None:
        """Give memory of rows back that were read, once nothing more of them is needed."""
        if self.order is None:
            self.tensor.release(first, last)
        elif last == len(self.order):
            self.tensor.release(0, last)


@dataclass(frozen=True)
class Sources:
    """The tensors, one or two that take turns, of which a parameter is made."""

    parts: tuple[Source, ...]

    def read(self, first: int, last: int) -> Tensor:
        """Rows of the parameter, ``float32 [last - first, columns]``."""
        found = [source.values(at, at + count) for source, at, count in self._runs(first, last)]
        return torch.from_numpy(found[0] if len(found) == 1 else np.concatenate(found))

    def release(self, first: int, last: int) -> None:
        for source, at, count in self._runs(first, last):
            source.release(at, at + count)

    def _runs(self, first: int, last: int) -> Iterator[tuple[Source, int, int]]:
        """Source, its first row, how many."""
        while first < last:
            source, (at, run) = next((part, found) for part in self.parts if (found := part.find(first)) is not None)
            count = min(run, last - first)
            yield source, at, count
            first += count
