"""Single parts of an engine step, called alone: attention, storing, linear layers (benchmarks/step_breakdown.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from linears import random_weight

from kvbits.codecs import PoolLayout
from kvbits.config import PAGE_TOKENS, ModelGeometry, pages_of
from kvbits.kernels import BatchLayout, SequencePages
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.hugepages import collapse_to_huge_pages
from kvbits.kernels.products import Products
from kvbits.models import LoadedModel
from kvbits.pool import PagedPool

QUERY_HEADS = (1, 2, 4)
"""Query heads of a KV head with which storing is timed; the line through them is read at none."""


class Clock:
    """Stands for a callable, or an object with a ``forward``, and adds up the seconds spent in it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        return self._timed(self._inner, args)

    def forward(self, *args: Any) -> Any:
        return self._timed(self._inner.forward, args)

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _timed(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        begin = time.perf_counter()
        found = call(*args)
        self.seconds += time.perf_counter() - begin
        return found


class Evict:
    """Reads a buffer larger than the caches, so that the next call finds its data in memory, as in a real step."""

    def __init__(self, size: int) -> None:
        self._buffer = torch.ones(size // 8, dtype=torch.int64)

    def __call__(self) -> None:
        assert int(self._buffer.max()) == 1


class Attention:
    """The fused call of every layer (store, seal, attend, settle) for one batch, with random rows.

    It is the call that the decoder makes, rows packed as there. Its arguments are made before, so that Python costs
    next to nothing.
    """

    def __init__(self, backend: CpuBackend, pool: PagedPool, batch: BatchLayout) -> None:
        layer = pool.layers[0].geometry
        sizes = (layer.num_heads * layer.key_dim, layer.num_kv_heads * layer.key_dim)
        width = sum(sizes) + layer.num_kv_heads * layer.value_dim
        generator = torch.Generator().manual_seed(0)
        self._rows = torch.randn(batch.num_rows, width, generator=generator).to(torch.bfloat16)
        self._out = torch.empty(batch.num_rows, layer.num_heads, layer.value_dim, dtype=torch.bfloat16)
        query = self._rows.data_ptr()
        key, value = query + 2 * sizes[0], query + 2 * sum(sizes)
        strides = (width, layer.key_dim), (width, layer.key_dim), (width, layer.value_dim)
        places: list[Any] = [p for at, stride in zip((query, key, value), strides, strict=True) for p in (at, *stride)]
        tables = backend.tables(batch)
        self._pool, self._batch = pool, batch  # the native side has only addresses of their memory
        self._forward = backend.native.forward
        self._calls = [
            (backend.layer(view), tables, False, *places, 0, self._out.data_ptr(), False) for view in pool.layers
        ]

    def seconds(self) -> float:
        begin = time.perf_counter()
        for call in self._calls:
            self._forward(*call)
        return time.perf_counter() - begin


class Storing:
    """Append, seal and settle by extrapolation to no query head.

    The fused call cannot be told not to attend. So it is timed on caches in which attention has nearly nothing to read
    (a sequence's first tokens; for a chunk, the chunk itself) and with 1, 2 and 4 query heads a KV head; what the line
    through these times says for none is what does not depend on attention: storing, and the fixed cost of the calls.
    """

    def __init__(self, backend: CpuBackend, pool: PagedPool, batch: int, chunk: int) -> None:
        self._decode = {
            (heads, start): Attention(backend, *_first_tokens(pool, heads, batch, start, 1))
            for heads in QUERY_HEADS
            for start in ((0, 1, PAGE_TOKENS - 2, PAGE_TOKENS - 1) if heads == QUERY_HEADS[0] else (1,))
        }
        self._chunk = {heads: Attention(backend, *_first_tokens(pool, heads, 1, 0, chunk)) for heads in QUERY_HEADS}

    def decode(self, evict: Callable[[], None]) -> tuple[float, float]:
        """Seconds of storing a decode step's tokens, and what a page's first and last token cost more, on average.

        The second is a 64th of both, the last one's by the difference of the calls that store a page's last two tokens.
        """
        times = {key: _cold(call, evict) for key, call in self._decode.items()}
        plain = _at_none({heads: times[heads, 1] for heads in QUERY_HEADS})
        first = QUERY_HEADS[0]
        begins = times[first, 0] - times[first, 1]
        seals = times[first, PAGE_TOKENS - 1] - times[first, PAGE_TOKENS - 2]
        return plain, (begins + seals) / PAGE_TOKENS

    def chunk(self, evict: Callable[[], None]) -> float:
        """Seconds of storing and sealing a chunk of a prompt."""
        return _at_none({heads: _cold(call, evict) for heads, call in self._chunk.items()})


def _cold(call: Attention, evict: Callable[[], None]) -> float:
    evict()
    return call.seconds()


def _at_none(times: dict[int, float]) -> float:
    return float(np.polyfit(list(times), list(times.values()), 1)[1])


def _first_tokens(pool: PagedPool, heads: int, sequences: int, start: int, count: int) -> tuple[PagedPool, BatchLayout]:
    """A pool with ``heads`` query heads a KV head, and a batch: ``count`` tokens after ``start`` of each sequence."""
    layers = tuple(replace(layer, num_heads=heads * layer.num_kv_heads) for layer in pool.geometry.layers)
    geometry: ModelGeometry = replace(pool.geometry, layers=layers)
    layout = PoolLayout.of(geometry, pool.policy, free_windows=False)
    longest = pages_of(start + count) * PAGE_TOKENS
    own = layout.frames_of(longest)
    made = PagedPool(geometry, pool.policy, sequences * layout.session_bytes(longest), free_windows=False)
    made.buffer.zero_()
    slices = []
    for s in range(sequences):
        frames = list(range(s * own, (s + 1) * own))
        opened = frames[: layout.open.frames]
        full = frames[layout.open.frames :]
        first = full[: layout.first_frames] if layout.sink else []
        slices.append(SequencePages(start, count, full[len(first) :], opened, opened, first))
    return made, BatchLayout.of(slices)


class Linears:
    """The linear layers of all decoder layers, one after another, on weights of their own (random, of the same shapes
    and formats).

    Query, key and value of one format are one product, and gate and up; each layer has its own weights, so that they
    come from memory.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._products = Products()
        self._weights = []
        for layer in loaded.model.get_decoder().layers:
            attention, mlp = layer.self_attn, layer.mlp
            for parts in (
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            ):
                for form in {part.weight.weight_format.name: part.weight.weight_format for part in parts}.values():
                    same = [part.weight for part in parts if part.weight.weight_format == form]
                    out = sum(weight.out_features for weight in same)
                    self._weights.append(random_weight(form, out, same[0].in_features))
        collapse_to_huge_pages()  # as loading a model does with its weights
        self._head = loaded.model.get_output_embeddings().weight

    def seconds(self, rows: int) -> float:
        """All layers on ``rows`` rows."""
        inputs = {w.in_features: torch.randn(rows, w.in_features).to(torch.bfloat16) for w in self._weights}
        begin = time.perf_counter()
        for weight in self._weights:
            self._products.apply(weight, inputs[weight.in_features])
        return time.perf_counter() - begin

    def head(self, rows: int) -> float:
        """The head on ``rows`` rows."""
        x = torch.randn(rows, self._head.in_features).to(torch.bfloat16)
        begin = time.perf_counter()
        self._products.apply(self._head, x)
        return time.perf_counter() - begin


def median_of(values: Sequence[float]) -> float:
    return float(np.median(values))
