"""Blocks as vLLM lays them out for kvbits, without vLLM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvbits.codecs import OPEN, parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry

LAYERS = (LayerGeometry(6, 2, 64, 64, 0.125), LayerGeometry(4, 1, 32, 32, 0.2, window=70, softcap=20.0, sinks=True))
BLOCKS = 40


class VllmMemory:
    """Blocks as vLLM lays them out (``BLHNC``): layer after layer in a block; open pages begin at its start too."""

    def __init__(
        self, dtype: str, parities: int, layers: tuple[LayerGeometry, ...] = LAYERS, blocks: int = BLOCKS
    ) -> None:
        self.policy, self.parities, self.layers = parse_policy(dtype, len(layers)), parities, layers
        sizes = [s.layer_bytes(g) for s, g in zip(self.policy.layers, layers, strict=True)]
        self.frame = max(sum(sizes), *(OPEN.layer_bytes(g) for g in layers))
        self.bytes = torch.full((blocks, self.frame), 0xFF, dtype=torch.uint8)
        self._starts = np.cumsum([0, *sizes])

    def layer(self, index: int) -> Tensor:
        layer = self.layers[index]
        return self._part(int(self._starts[index]), layer, self.policy.layers[index].head_bytes(layer))

    def open_memory(self, index: int, parity: int) -> Tensor:
        return self._part(0, self.layers[index], OPEN.head_bytes(self.layers[index])).view(torch.bfloat16)

    def open_frame(self, index: int) -> int:
        return index

    def _part(self, start: int, layer: LayerGeometry, head: int) -> Tensor:
        token = head // PAGE_TOKENS
        shape = (len(self.bytes), layer.num_kv_heads, PAGE_TOKENS, token)
        return self.bytes.as_strided(shape, (self.frame, head, token, 1), start)
