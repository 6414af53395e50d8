"""Where a parameter of the model lies in a file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

    def place(self, row: int) -> int:
        """The parameter's row (all dimensions but the last counted together) of the stored one."""
        return row + self.shift + (row // self.group * self.group if self.group else 0)

    def run(self, row: int) -> int:
        """How many rows from ``row`` on stay neighbours."""
        return self.group - row % self.group if self.group else len(self.tensor.rows()) - row
