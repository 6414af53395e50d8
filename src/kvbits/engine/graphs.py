"""Decode steps recorded once by the device and replayed: no Python between two kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.engine.batch import StepBatch
from kvbits.kernels import Backend, BatchLayout
from kvbits.kernels.static import refill, static_layout
from kvbits.models import LoadedModel
from kvbits.pool import PagedPool

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Sequences of the recorded steps; a step is padded to the next."""

_LEAST_PAGES = 16


class Graph(Protocol):
    """What a device records."""

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        """Record what ``step`` does, which may run for that; returns where its result will lie."""

    def replay(self) -> None:
        """Do it again, with what now lies in the memory that it read."""


class CudaGraph:
    """A CUDA graph; those of one ``pool`` share its memory, since one runs after another."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def capture(self, step: Callable[[], Tensor]) -> Tensor:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            step()  # compiles, and puts tables where the graph will read them
        torch.cuda.current_stream().wait_stream(beside)
        # what other threads do meanwhile is theirs: by default it would end the recording
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return step()

    def replay(self) -> None:
        self._graph.replay()


@dataclass(frozen=True)
class _Recorded:
    """Everything that the graph reads has to live as long as it does."""

    graph: Graph
    layout: BatchLayout
    ids: Tensor
    positions: Tensor
    rows: Tensor
    logits: Tensor


class DecodeGraphs:
    """Steps of one token of each sequence, by number of sequences and depth, and whether one of them completes a page;
    anything else is not for graphs.

    Depths are powers of two in pages; a recording is made when a size and depth first come (:meth:`warm_up`: before).
    Where one fails, the log says why, and all steps run as they would without graphs. ``make`` makes what records.
    """

    def __init__(
        self, loaded: LoadedModel, pool: PagedPool, backend: Backend, make: Callable[[], Graph] | None = None
    ) -> None:
        self._loaded, self._pool, self._backend = loaded, pool, backend
        if make is None:
            memory = torch.cuda.graph_pool_handle()
            make = lambda: CudaGraph(memory)  # noqa: E731
        self._make = make
        self._known: dict[tuple[int, int, int, bool, bool], _Recorded] = {}
        self.off: str | None = None
        """Why there are no graphs after all."""

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> Tensor | None:
        """Logits, valid until the next call; ``None`` where the step has to run without a graph."""
        layout, count = batch.layout, len(batch.layout.counts)
        if count > SIZES[-1] or (layout.counts != 1).any() or len(batch.logits_rows) != count:
            return None
        recorded = self._recorded(count, layout.sealed.shape[1], layout.sink.shape[1], layout.draft, layout.completes)
        if recorded is None:
            return None
        refill(recorded.layout, layout)
        recorded.ids[:count].copy_(batch.input_ids)
        recorded.positions[:count].copy_(batch.positions)
        recorded.graph.replay()
        return recorded.logits[:count]

    @torch.inference_mode()
    def warm_up(self, sequences: int, report: Callable[[str], None]) -> None:
        """Record short steps of all sizes up to ``sequences``; ``report`` gets a line before each."""
        sink = self._pool.layout.sink
        for size in SIZES:
            if size < 2 * sequences and self.off is None:
                report(f"Warming up: steps of {size} sequences")
                for frames, completes in product({0, sink.frames if sink else 0}, (False, True)):
                    self._recorded(size, _LEAST_PAGES, frames, False, completes)

    def _recorded(self, count: int, pages: int, sink_frames: int, draft: bool, completes: bool) -> _Recorded | None:
        size = next(size for size in SIZES if size >= count)
        pages = max(_LEAST_PAGES, 1 << (pages - 1).bit_length())
        key = size, pages, sink_frames, draft, completes
        if key not in self._known and self.off is None:
            frames, groups = self._pool.layout.open.frames, len(self._pool.layout.groups)
            layout = static_layout(size, pages, frames, sink_frames, draft, completes, groups)
            try:
                self._known[key] = self._record(layout)
            # A model's own code may do what no graph can hold; its steps are right without.
            except Exception as error:
                self.off = f"{type(error).__name__}: {error}"
                log.warning("Steps cannot be recorded as graphs; they run without: %s", self.off)
        return self._known.get(key)

    def _record(self, layout: BatchLayout) -> _Recorded:
        """Of a layout without sequences: a step that is recorded stores nothing."""
        size, device = len(layout.counts), self._pool.buffer.device
        ids, positions = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(2))
        rows = torch.arange(size, device=device)
        step = Forward(self._pool, self._backend, layout)
        graph = self._make()
        logits = graph.capture(lambda: self._loaded.forward(ids, positions, step, rows))
        return _Recorded(graph, layout, ids, positions, rows, logits)


def graphs_for(loaded: LoadedModel, pool: PagedPool, backend: Backend) -> DecodeGraphs | None:
    """``None`` where the device or the kernels record nothing, or recurrent layers keep states: in other slots each
    step."""
    return DecodeGraphs(loaded, pool, backend) if backend.graphs and pool.states is None else None
