"""A layer's part of vLLM's memory as kernels see it. Torch only."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvbits.codecs import OPEN, Place, Policy
from kvbits.config import LayerGeometry
from kvbits.pool import LayerView


class Pages(Protocol):
    """Who knows the policy and where open pages lie."""

    parities: int

    @property
    def policy(self) -> Policy: ...
    def open_memory(self, index: int, parity: int) -> Tensor: ...
    def open_frame(self, index: int) -> int: ...


def view_of(memory: Tensor, index: int, geometry: LayerGeometry, pages: Pages) -> LayerView:
    """Of layer ``index``, whose blocks ``memory`` holds: ``[blocks, kv_heads, 64, bytes]``, layers inside a block.

    A frame is a block with all its layers. That vLLM laid pages out as kernels read them is asserted, not assumed.
    """
    policy = pages.policy
    scheme = policy.layers[index]
    storage, frame = memory.untyped_storage(), _bytes(memory, 0)
    buffer = torch.empty(0, dtype=torch.uint8, device=memory.device)
    buffer.set_(storage, 0, (storage.nbytes() // frame, frame), (frame, 1))
    assert _bytes(memory, 1) == scheme.head_bytes(geometry), (memory.shape, memory.stride(), scheme)
    offsets = set()
    for parity in range(pages.parities):
        page = pages.open_memory(index, parity)
        assert page.untyped_storage().data_ptr() == storage.data_ptr()
        assert (_bytes(page, 0), _bytes(page, 1)) == (frame, OPEN.head_bytes(geometry)), (page.shape, page.stride())
        offsets.add(_offset(page))
    assert len(offsets) == 1, offsets
    return LayerView(
        index=index,
        geometry=geometry,
        buffer=buffer,
        sealed=Place(scheme, 0, _offset(memory)),
        open=Place(OPEN, pages.open_frame(index), offsets.pop()),
        rounding=policy.rounding[index] if policy.rounding else None,
    )


def _bytes(memory: Tensor, dim: int) -> int:
    return memory.stride(dim) * memory.element_size()


def _offset(memory: Tensor) -> int:
    """Bytes from the start of the allocation to the layer's first block."""
    return memory.data_ptr() - memory.untyped_storage().data_ptr()
