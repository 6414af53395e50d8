"""Runs the model for one step on the pool."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.codecs import Policy
from kvbits.engine.batch import StepBatch
from kvbits.kernels import Backend
from kvbits.models import LoadedModel
from kvbits.pages import PageManager
from kvbits.pool import PagedPool


class Runner:
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
