"""What transformers sees as one layer of the cache. All layers share pages, so the work is done by the cache."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kvbits.config import LayerGeometry
from kvbits.errors import UnsupportedError
from kvbits.hf.attention import CachedKeys

if TYPE_CHECKING:
    from kvbits.hf.cache import QuantizedCache


class QuantizedLayer(CacheLayerMixin):
    """One layer: hands its keys and values on to the attention, which stores them; knows lengths and its window."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: QuantizedCache, geometry: LayerGeometry) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # weak: pages are free as soon as the last name of the cache is gone, not when cycles are looked for
        self._owner = weakref.ref(cache)
        self._geometry = geometry
        self.is_sliding = geometry.window is not None

    @property
    def _cache(self) -> QuantizedCache:
        cache = self._owner()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated by layer."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys, marked for :func:`kvbits.hf.attention.attend_cached`, and values as they are.

        Both ``[batch, heads, tokens, dim]``. Raises ``UnsupportedError`` when the model's attention is not kvbits'.
        """
        self._cache.check_attention()
        return CachedKeys.of(key_states, self._cache), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """``(columns that the mask covers, first one)``: all, also where the layer has a window."""
        return self._cache.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns stored, padding included."""
        return self._cache.get_seq_length()

    def get_max_length(self) -> int:
        """The layer's window, or -1: no bound but the pool's memory."""
        return self._geometry.window or -1

    @property
    def record_past(self) -> bool:
        """Whether the last step can be taken back."""
        return self._cache.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._cache.recording = value

    def reset(self) -> None:
        self._refuse("reset")

    def crop(self, tokens_to_remove: int) -> None:
        self._refuse("crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._refuse("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        self._refuse("batch_select_indices")

    def offload(self) -> None:
        self._refuse("offload")

    def prefetch(self) -> None:
        self._refuse("prefetch")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedError(f"the layers of a kvbits cache share their pages: {what} works on the whole cache only")


class HybridLayer(LinearAttentionLayer, QuantizedLayer):  # type: ignore[override,misc]
    """Attention and a recurrent part in one layer: its state is kept as transformers keeps it."""

    is_compileable = False

    def __init__(self, cache: QuantizedCache, geometry: LayerGeometry, number_of_states: int) -> None:
        QuantizedLayer.__init__(self, cache, geometry)
        LinearAttentionLayer.__init__(self, number_of_states)
