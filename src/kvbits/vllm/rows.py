"""Keys and values in a chunk of vLLM's offload: where they lie in a row of its host memory. Torch only.

A row has one part for each tensor-parallel worker; a part has the chunk's blocks, as the worker's cache has them, the
layers' pages one after another (layouts that begin with ``L``) or block after block (with ``B``). A token's key and
value of a head lie side by side (``vllm/v1/kv_cache_layout.py``, ``vllm/v1/kv_offload/cpu/gpu_worker.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("LBNHC", "LBHNC", "BLNHC", "BLHNC", "BHLNC")
"""``L`` layers, ``B`` blocks, ``H`` heads, ``N`` tokens, ``C`` a head's key and value. ``LHBNC`` has no blocks that
could be copied whole."""


@dataclass(frozen=True)
class RowLayout:
    """Sizes of a row: ``workers`` parts, each with ``layers`` of ``blocks`` times ``tokens`` tokens and ``heads``."""

    layout: str
    workers: int
    layers: int
    blocks: int
    tokens: int
    heads: int
    head_size: int

    @property
    def part_bytes(self) -> int:
        """Of one worker's part."""
        return 4 * self.layers * self.blocks * self.tokens * self.heads * self.head_size

    def shares(self, row: Tensor, layers: int, dtype: torch.dtype) -> list[Tensor]:
        """Views ``[2, layers, blocks, tokens, heads, head_size]`` of every worker's part of ``row`` ``uint8 [bytes]``.

        ``layers``: those of one of vLLM's groups, which share memory: a small one leaves the rest of a block.
        """
        sizes = {"L": layers, "B": self.blocks, "H": self.heads, "N": self.tokens}
        order = [axis for axis in self.layout if axis in sizes]
        shape = [*(sizes[axis] for axis in order), 2, self.head_size]
        axes = [len(order), *(order.index(axis) for axis in "LBNH"), len(order) + 1]
        outer = shape[0]
        used = math.prod(shape) // outer
        parts = row[: self.workers * self.part_bytes].view(dtype).view(self.workers, -1)
        if order[0] == "L":  # the layers that this group has not come last
            parts = parts[:, : outer * used]
        blocks = parts.unflatten(1, (outer, -1))[..., :used]
        return [part.unflatten(-1, shape[1:]).permute(axes) for part in blocks]
