"""Runs the model for one step on the pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.codecs import Policy
from kvbits.config import PAGE_TOKENS
from kvbits.engine.batch import Piece, StepBatch, build
from kvbits.engine.graphs import graphs_for
from kvbits.engine.sampler import NOT_FINITE, finite_rows
from kvbits.errors import RequestError
from kvbits.kernels import Backend
from kvbits.kernels.device import on_device
from kvbits.models import LoadedModel
from kvbits.pages import PageManager
from kvbits.pool import PagedPool


class ModelRunner:
    """The model, the pool it caches in, and the kernels between them."""

    def __init__(self, loaded: LoadedModel, pool: PagedPool, pages: PageManager, backend: Backend) -> None:
        self._loaded = loaded
        self._pool = pool
        self._pages = pages
        self._backend = backend
        self.graphs = graphs_for(loaded, pool, backend)

    @property
    def policy(self) -> Policy:
        """How the pool stores what the model computes."""
        return self._pool.policy

    def run(self, batch: StepBatch) -> Tensor:
        """Store the batch's keys and values; returns logits, float32 ``[outputs, vocab]``, on the model's device."""
        with torch.inference_mode(), on_device(self._pool.buffer.device):
            for source, target in self._pages.take_copies():
                self._pool.copy(source, target)
            logits = None if self.graphs is None else self.graphs.run(batch)
            if logits is not None:
                return logits
            step = Forward(self._pool, self._backend, batch.layout)
            return self._loaded.forward(batch.input_ids, batch.positions, step, batch.logits_rows)

    def warm_up(self, seq_id: int, tokens: int, chunk: int, sequences: int, report: Callable[[str], None]) -> None:
        """Run what requests will, so that no kernel is compiled for one of them.

        A prompt of ``tokens`` tokens in parts of ``chunk``, a part of two tokens, steps of up to ``sequences``
        sequences; ``report`` gets a line before each.
        """
        report(f"Warming up: a prompt of {tokens} tokens")
        for size in (chunk, 2):
            for _ in self.teacher_forced(seq_id, [0] * (tokens if size == chunk else size), 0, size):
                pass
        if self.graphs is not None:
            with on_device(self._pool.buffer.device):
                self.graphs.warm_up(sequences, report)

    def teacher_forced(
        self, seq_id: int, tokens: Sequence[int], first: int, chunk: int, singly: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Logits for tokens that are given; see :meth:`kvbits.engine.engine.Engine.teacher_forced`."""
        pages = self._pages
        # A salt that no request can have (it is not UTF-8) keeps these pages from being found.
        pages.open(seq_id, [], b"\xff%d" % seq_id)
        try:
            end = 0
            while (start := end) < len(tokens):
                end = min(start + chunk, len(tokens))
                if singly:
                    end = min(end, max(first, start + 1))
                # Windows give back between steps what a shorter one then takes.
                while end - start > PAGE_TOKENS and pages.frames_needed(seq_id, end - start) > pages.available():
                    end -= PAGE_TOKENS
                part = tokens[start:end]
                pages.reserve(seq_id, len(part))
                outputs = max(0, min(len(part), end - first))
                logits = self.run(build([Piece(seq_id, start, part, outputs)], pages)).cpu()
                pages.commit(seq_id, part)
                if outputs:
                    if not all(finite_rows(logits)):
                        raise RequestError(NOT_FINITE)
                    yield end - outputs, logits
        finally:
            pages.free(seq_id)
