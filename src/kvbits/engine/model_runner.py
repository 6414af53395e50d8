"""Runs the model for one step on the pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.codecs import Policy
from kvbits.config import PAGE_TOKENS
from kvbits.engine.batch import Piece, StepBatch, build
from kvbits.engine.sampler import NOT_FINITE, finite_rows
from kvbits.errors import RequestError
from kvbits.kernels import Backend
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

    @property
    def policy(self) -> Policy:
        """How the pool stores what the model computes."""
        return self._pool.policy

    def run(self, batch: StepBatch) -> Tensor:
        """Store the batch's keys and values; returns logits, float32 ``[outputs, vocab]``."""
        with torch.inference_mode():
            for source, target in self._pages.take_copies():
                self._pool.copy(source, target)
            step = Forward(self._pool, self._backend, batch.layout)
            return self._loaded.forward(batch.input_ids, batch.positions, step, batch.logits_rows)

    def teacher_forced(
        self, seq_id: int, tokens: Sequence[int], first: int, chunk: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Logits for tokens that are given; see :meth:`kvbits.engine.engine.Engine.teacher_forced`."""
        pages = self._pages
        # A salt that no request can have (it is not UTF-8) keeps these pages from being found.
        pages.open(seq_id, [], b"\xff%d" % seq_id)
        try:
            end = 0
            while (start := end) < len(tokens):
                end = min(start + chunk, len(tokens))
                # Windows give back between steps what a shorter one then takes.
                while end - start > PAGE_TOKENS and pages.frames_needed(seq_id, end - start) > pages.available():
                    end -= PAGE_TOKENS
                part = tokens[start:end]
                pages.reserve(seq_id, len(part))
                outputs = max(0, min(len(part), end - first))
                logits = self.run(build([Piece(seq_id, start, part, outputs)], pages))
                pages.commit(seq_id, part)
                if outputs:
                    if not all(finite_rows(logits)):
                        raise RequestError(NOT_FINITE)
                    yield end - outputs, logits
        finally:
            pages.free(seq_id)
