"""``kvbits.hf.QuantizedCache``: pass it as ``past_key_values`` to ``model.generate``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from kvbits.config import POLICY_PREFIX, ModelGeometry
from kvbits.errors import CacheError, UnsupportedError
from kvbits.hf.attention import IMPLEMENTATION, register
from kvbits.hf.batch import Batch
from kvbits.hf.layer import HybridLayer, QuantizedLayer
from kvbits.hf.states import RecurrentStates, own_layers
from kvbits.hf.store import Part, Store
from kvbits.kernels import Backend, choose_backend
from kvbits.models.geometry import geometry_of
from kvbits.models.load import wrap


class QuantizedCache(Cache):
    """A paged, quantized key/value cache for a transformers decoder, read by kvbits' fused attention.

    A token sees its own 64-token page in 16 bit and every earlier page as its sealed code; nothing is ever decoded as a
    whole. Works wherever transformers takes a cache: plain and batched (padded) generation, beams, assisted decoding,
    sliding windows, several turns. ``copy.deepcopy`` gives a cache that shares all pages (one prompt, many answers).
    Recurrent layers keep their states in transformers' own layers, as large as ever; states do not go back, so that
    assisted decoding is refused for such a model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv_cache_dtype: str | Path = "int8",
        *,
        kv_cache_memory: str | int | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Measure ``model``, reserve the pages and switch the model's attention to kvbits'.

        ``kv_cache_dtype``: a dtype (``"int4"``), a policy string (``"0-1:int8,2-29:int8/int4"``) or the directory of a
        calibrated policy. ``kv_cache_memory`` is bytes or text such as ``"256MiB"``, the most that all pages may take;
        without it a quarter of the free memory is the bound. On the CPU memory is taken page by page, as tokens
        come; on a GPU all of it at once. ``backend``: one of :data:`kvbits.kernels.BACKENDS`; "auto" goes by the
        model's device.

        The model is put in eval mode and works with kvbits caches only until
        ``model.set_attn_implementation("sdpa")``. Raises ``ConfigError`` for a dtype or policy that cannot be read,
        ``UnsupportedError`` for a model that kvbits cannot run.
        """
        if not isinstance(model, PreTrainedModel):
            # transformers' own caches take a configuration.
            raise UnsupportedError(f"QuantizedCache takes the model itself, not {type(model).__name__}")
        kernels = choose_backend(backend, str(model.device))
        geometry = geometry_of(model, latents=False)
        loaded = wrap(model, None, model.config.model_type, geometry)
        store = Store(loaded, _dtype(kv_cache_dtype), kv_cache_memory, kernels)
        register()
        model.set_attn_implementation(IMPLEMENTATION)
        decoder = model.get_decoder()
        if refuse_call not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(refuse_call, with_kwargs=True)
            decoder.register_forward_hook(note_end, with_kwargs=True)
        config = model.config.get_text_config(decoder=True)
        self._start(config, store, Batch(store, any(g.window for g in loaded.geometry.layers)))

    def _start(self, config: Any, store: Store, batch: Batch) -> None:
        layers = self._layers(config, store.pool.geometry)
        super().__init__(layers=layers)
        self.states = RecurrentStates(layers)
        self.recording = False
        self._config = config
        self._store = store
        self._batch = batch
        self._running = False
        self._done: set[int] = set()
        weakref.finalize(self, batch.clear).atexit = False

    def _layers(self, config: Any, geometry: ModelGeometry) -> list[Any]:
        """One for each of the model's: attention has pages, what is recurrent transformers' own layer."""
        if not geometry.states:
            return [QuantizedLayer(self, layer) for layer in geometry.layers]
        layers = own_layers(config)
        for index, layer in enumerate(geometry.layers):
            place = geometry.places[index] if geometry.places else index
            count = getattr(layers[place], "number_of_states", 0)
            layers[place] = HybridLayer(self, layer, count) if count else QuantizedLayer(self, layer)
        return layers

    # What the attention asks for

    def check_attention(self) -> None:
        """Raise ``UnsupportedError`` when the model would read the new keys as if they were all."""
        found = self._config._attn_implementation
        if found != IMPLEMENTATION:
            raise UnsupportedError(
                f"the model's attention is '{found}', which cannot read a kvbits cache; call "
                f"model.set_attn_implementation('{IMPLEMENTATION}')"
            )

    def check_shapes(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Raise ``CacheError`` for ``[batch, kv_heads, tokens, dim]`` of another model than the cache was made for."""
        geometry = self._store.pool.geometry
        g = geometry.layers[geometry.index_of(layer)]
        found = (key.shape[1], key.shape[3], value.shape[3])
        if found != (g.num_kv_heads, g.key_dim, g.value_dim):
            raise CacheError(
                f"layer {layer} of the model brings {found[0]} KV heads of sizes {found[1]} and {found[2]}; the cache "
                f"was made for {g.num_kv_heads} of {g.key_dim} and {g.value_dim}"
            )

    @contextmanager
    def step(self, layer: int, rows: int, columns: int, mask: Tensor | None) -> Iterator[tuple[Part, ...]]:
        """The kernel calls of the model's ``layer``; the first layer of a forward pass begins it, the last one ends it.

        No other cache on the same pool takes pages meanwhile.
        """
        with self._store.lock:
            if not self._running or layer in self._done:
                self._batch.begin(rows, columns, None if mask is None else mask.cpu(), self.recording)
                self._running = True
                self._done.clear()
            yield self._batch.parts()
            self._done.add(layer)
            if len(self._done) == self._store.pool.geometry.num_layers + len(self._store.pool.geometry.shared):
                self._running = False
                self._done.clear()
                self._batch.finish(self.recording)

    # transformers' interface

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns stored, padding included."""
        return self._batch.length

    @property
    def batch_size(self) -> int:
        """Rows stored; -1 while the cache is empty."""
        return len(self._batch) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether anything is stored."""
        return len(self._batch) > 0

    @property
    def is_linear(self) -> list[bool]:
        """Which layers are recurrent and nothing else."""
        return [isinstance(layer, LinearAttentionLayer) and not isinstance(layer, HybridLayer) for layer in self.layers]

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return not self.states

    def activate_past_recording(self) -> None:
        """Let :meth:`crop` take back any of the last 64 tokens of each forward pass from now on.

        Raises ``UnsupportedError`` for a model with recurrent layers.
        """
        if self.states:
            self._store.pool.geometry.refuse_states("assisted decoding, which takes tokens back,")
        self.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; ``tokens_to_remove`` is negative or 0, as transformers wants it.

        Tokens of the open page can always be taken back, and while the past is recorded any of the last 64 of the last
        forward pass. Raises ``CacheError`` for others, and changes nothing then.
        """
        if tokens_to_remove > 0:
            raise CacheError(
                f"crop takes the negative number of tokens to remove; it was called with {tokens_to_remove}"
            )
        if self.states and 0 < -tokens_to_remove < self._batch.length:
            raise CacheError(
                f"cannot take back {-tokens_to_remove} tokens: the states of recurrent layers do not go back"
            )
        self._batch.crop(-tokens_to_remove)
        if not self._batch.length:
            self.states.clear()

    def reset(self) -> None:
        """Forget everything; all pages are free at once."""
        self._running = False
        self._done.clear()
        self._batch.clear()
        self.states.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` is. No page is copied; an open page is when it is written next."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, one after another; they share their pages."""
        self._select([row for row in range(len(self._batch)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that ``indices`` (``int64``) name or (``bool``) mark."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(rows.tolist())

    def _select(self, rows: list[int]) -> None:
        if len(self._batch):
            self._batch.select(rows)
            self.states.select(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedCache:
        """A cache of the same rows on the same pool; pages are shared until they are written."""
        twin = type(self).__new__(type(self))
        twin._start(self._config, self._store, self._batch.fork())
        twin.recording = self.recording
        self.states.copy_to(twin.states)
        memo[id(self)] = twin
        return twin

    def __repr__(self) -> str:
        dtype, rows, length = self._store.pool.policy.name, len(self._batch), self._batch.length
        return f"{type(self).__name__}({dtype}, rows={rows}, length={length}, bytes={self.nbytes})"

    # What it costs

    @property
    def nbytes(self) -> int:
        """Bytes of all pages in use, open ones included, and of states; caches that share pages share them here too."""
        stats = self._store.pages.stats()
        return self._store.pool.layout.bytes_of(stats.open + stats.sealed) + self.states.nbytes

    @property
    def bits_per_element(self) -> float:
        """Stored bits per key or value element of a sealed page, every parameter counted."""
        return self._store.pool.bits_per_element()


def _dtype(value: str | Path) -> str:
    """A policy's directory may be named without its prefix."""
    return f"{POLICY_PREFIX}{value}" if isinstance(value, Path) or Path(value).is_dir() else value


def refuse_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a decoder's forward pass: raise ``UnsupportedError`` for what a kvbits cache cannot do, by its name.

    Not every model tells its attention layers; without this they would drop what was asked for.
    """
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, QuantizedCache):
        return
    if kwargs.get("use_cache") is False:
        raise UnsupportedError(
            "use_cache=False was asked for together with a kvbits cache, which keeps every token that passes: leave "
            "out one of them (without a cache: model.set_attn_implementation('sdpa'))"
        )
    if kwargs.get("output_attentions"):
        raise UnsupportedError(
            "output_attentions=True was asked for; the kernels that read a kvbits cache have no attention weights to "
            "give: model.set_attn_implementation('eager') without the cache has"
        )
    cache.states.begin()


def note_end(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After a decoder's forward pass: states are those after its last token."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, QuantizedCache):
        cache.states.end()
