"""The states of recurrent layers in a transformers cache: transformers' own layers, handled as a whole.

States know no way back: what a pass has changed is changed, for every row. So a pass that did not come to its end
leaves a cache that can only be reset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvbits.errors import CacheError

_TENSORS = ("conv_states", "recurrent_states")


def own_layers(config: Any) -> list[Any]:
    """transformers' layers of a cache for the model of ``config``, one for each of the model's."""
    return DynamicCache(config=config).layers


class RecurrentStates:
    """Those of ``layers`` that keep a state, beside attention or alone; perhaps none."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = [layer for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
        self._unfinished = False

    def __bool__(self) -> bool:
        return bool(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' states."""
        return sum(state.nbytes for layer in self._layers for state in _tensors(layer).values())

    def begin(self) -> None:
        """A forward pass begins. Raises ``CacheError`` when the last one did not end."""
        if self._unfinished and self:
            raise CacheError("a forward pass through this cache did not come to its end; call cache.reset() first")
        self._unfinished = True

    def end(self) -> None:
        """The pass has run."""
        self._unfinished = False

    def select(self, rows: list[int]) -> None:
        """Make row ``i`` what row ``rows[i]`` is."""
        for layer in self._layers:
            for (name, number), state in _tensors(layer).items():
                getattr(layer, name)[number] = state[torch.tensor(rows, dtype=torch.int64, device=state.device)]

    def clear(self) -> None:
        """Forget everything; the next pass may have another number of rows."""
        self.end()
        for layer in self._layers:
            LinearAttentionCacheLayerMixin.__init__(layer, layer.number_of_states)

    def copy_to(self, twin: RecurrentStates) -> None:
        """Copies of all states for ``twin``, whose layers are of the same kinds."""
        twin._unfinished = self._unfinished
        for source, target in zip(self._layers, twin._layers, strict=True):
            for name in ("conv_kernel_size", "has_previous_state", *(f"is_{kind}_initialized" for kind in _TENSORS)):
                setattr(target, name, dict(getattr(source, name)))
            target.device, target.dtype = source.device, source.dtype
            for (name, number), state in _tensors(source).items():
                getattr(target, name)[number] = state.clone()


def _tensors(layer: Any) -> dict[tuple[str, int], Tensor]:
    """By kind and number."""
    kinds = ((name, getattr(layer, name)) for name in _TENSORS)
    return {(name, number): state for name, states in kinds for number, state in states.items() if state is not None}
