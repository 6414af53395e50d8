"""How far each layer's attention output moves when only that layer reads a quantized cache, and what codes read back.

The model runs once, on the 16-bit cache. At every layer the same queries, keys and values also go through a pool of
each dtype, and its output is compared with the 16-bit one and then dropped, so no layer sees another's error. What the
sealed pages read back is compared with what was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.codecs import Policy
from kvbits.config import PAGE_TOKENS
from kvbits.engine.batch import Piece, StepBatch, build
from kvbits.engine.engine import Engine
from kvbits.evaluation.compare import REFERENCE, MakeBackend, engine_for
from kvbits.kernels import Backend, BatchLayout, default_backend
from kvbits.kernels.base import Watcher
from kvbits.kernels.reference import read_page
from kvbits.models import LoadedModel
from kvbits.pool import LayerView, PagedPool


@dataclass(frozen=True)
class LayerError:
    """One layer: its attention output ``o'`` against the 16-bit ``o`` (tokens after the first page), and its codes.

    ``error = ||o' - o|| / ||o||``. With ``x`` what was stored and ``x'`` what sealed pages read back, both about each
    channel's mean in its page, ``key_off`` is ``max(<x', x> / <x, x>, <x', x> / <x', x'>) - 1``. Rounding, however
    coarse, keeps both ratios at 1 or below (to nearest the first is 1, with centroids the second); a scale that is off
    by ``s`` multiplies one of them by it. ``value_off`` likewise.
    """

    layer: int
    error: float
    key_off: float
    value_off: float


class Sums:
    """``float64 [8, layers]``: squares of ``o' - o`` and ``o``; then products of ``x'`` and ``x`` (keys, values)."""

    def __init__(self, layers: int) -> None:
        self.values = torch.zeros(8, layers, dtype=torch.float64)

    def add_output(self, layer: int, output: Tensor, other: Tensor) -> None:
        """Add rows ``[rows, heads, dim]`` of the 16-bit cache and of the dtype."""
        wide = output.double()
        self.values[0, layer] += (other.double() - wide).square().sum().cpu()
        self.values[1, layer] += wide.square().sum().cpu()

    def add_page(self, layer: int, stored: tuple[Tensor, Tensor], read: tuple[Tensor, Tensor]) -> None:
        """Add a page's keys and values ``[64, kv_heads, dim]``, as they were stored and as they read back."""
        for row, own, back in zip((2, 5), stored, read, strict=True):
            x, y = (t.double() - t.double().mean(0) for t in (own.cpu(), back))
            self.values[row : row + 3, layer] += torch.stack([(x * y).sum(), x.square().sum(), y.square().sum()])

    def as_json(self) -> list[list[float]]:
        """The sums in plain types."""
        found: list[list[float]] = self.values.tolist()
        return found


def layer_errors(parts: Sequence[Sequence[Sequence[float]]]) -> list[LayerError]:
    """Errors by layer from the sums of several windows."""
    sums = torch.tensor(parts, dtype=torch.float64).sum(0)
    # nothing stored, or a codec that reads back nothing, is off by nothing
    off = [sums[i] / torch.minimum(sums[i + 1], sums[i + 2]).clamp(min=1e-30) - 1 for i in (2, 5)]
    columns = ((sums[0] / sums[1]).sqrt(), *off)
    return [LayerError(i, *row) for i, row in enumerate(torch.stack(columns, 1).tolist())]


class _Listening(Watcher):
    """Answers from the 16-bit pool and compares with the others on the way."""

    name = "listening"

    def __init__(self, backend: Backend, sums: Mapping[str, Sums]) -> None:
        super().__init__(backend)
        self._sums = sums
        self.others: dict[str, tuple[PagedPool, BatchLayout]] = {}

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        output = self._backend.forward(view, batch, query, key, value, sinks)
        # tokens of the first page read nothing but 16 bit
        first = max(0, PAGE_TOKENS - int(batch.starts[0]))
        for dtype, (pool, layout) in self.others.items():
            own = replace(layout, again=batch.again)
            other = self._backend.forward(pool.layers[view.index], own, query, key, value, sinks)
            self._sums[dtype].add_output(view.index, output[first:], other[first:])
            self._compare_pages(self._sums[dtype], pool.layers[view.index], own, key, value)
        return output

    @staticmethod
    def _compare_pages(sums: Sums, view: LayerView, batch: BatchLayout, key: Tensor, value: Tensor) -> None:
        """Read back the pages that the step stored whole; the first page of a sequence may have a format of its own."""
        start, count = int(batch.starts[0]), int(batch.counts[0])
        for page in range(max(1, -(-start // PAGE_TOKENS)), (start + count) // PAGE_TOKENS):
            rows = slice(page * PAGE_TOKENS - start, (page + 1) * PAGE_TOKENS - start)
            back = read_page(view, view.sealed, int(batch.frames_of(view)[0, page]))
            sums.add_page(view.index, (key[rows], value[rows]), back)


def measure_layers(
    loaded: LoadedModel,
    policies: Sequence[Policy],
    window: Sequence[int],
    max_num_batched_tokens: int = 512,
    progress: Callable[[int], None] = lambda tokens: None,
    backend: MakeBackend = lambda: None,
) -> dict[str, Sums]:
    """Run ``window`` (token ids) once; the sums by label. Raises as :func:`kvbits.evaluation.compare.compare`."""
    budget = max_num_batched_tokens
    engines = {p.label: engine_for(loaded, p, 1, len(window), budget) for p in (loaded.policy(REFERENCE), *policies)}
    dtypes = [policy.label for policy in policies]
    sums = {dtype: Sums(loaded.geometry.num_layers) for dtype in dtypes}
    listening = _Listening(backend() or default_backend(str(loaded.device)), sums)
    for engine in engines.values():
        engine.pages.open(0, [])
    for start in range(0, len(window), max_num_batched_tokens):
        part = window[start : start + max_num_batched_tokens]
        steps = {dtype: _reserved(engine, part, start) for dtype, engine in engines.items()}
        listening.others = {dtype: (engines[dtype].pool, steps[dtype].layout) for dtype in dtypes if dtype != REFERENCE}
        main = steps[REFERENCE]
        step = Forward(engines[REFERENCE].pool, listening, main.layout)
        loaded.forward(main.input_ids, main.positions, step, main.logits_rows)
        for engine in engines.values():
            engine.pages.commit(0, list(part))
        progress(len(part))
    return sums


def _reserved(engine: Engine, part: Sequence[int], start: int) -> StepBatch:
    engine.pages.reserve(0, len(part))
    return build([Piece(0, start, part, 1)], engine.pages)
