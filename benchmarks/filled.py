"""Engines whose sequences already have long contexts: what a step costs does not depend on how the cache was filled.

A prompt of real text is computed; its pages, sealed and open, are then written into the frames of every sequence, each
its own (nothing is shared). The engine, its scheduler and its page tables take the same way as with computed prompts;
only the model is left out while the contexts are filled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvbits.config import PAGE_TOKENS, EngineConfig
from kvbits.engine.batch import StepBatch
from kvbits.engine.engine import Engine
from kvbits.engine.outputs import Delta
from kvbits.engine.params import SamplingParams
from kvbits.evaluation.compare import pool_bytes
from kvbits.evaluation.documents import reference_text
from kvbits.models import LoadedModel
from kvbits.pool import PagedPool

SAMPLE_PAGES = 8
"""Pages of real text that the contexts are made of."""


@cache
def _tokens(tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(reference_text(), add_special_tokens=False, verbose=False)["input_ids"])


def text_tokens(loaded: LoadedModel) -> list[int]:
    """Token ids of a long real text, the one that ``kvbits bench`` takes."""
    return list(_tokens(loaded.tokenizer))


@dataclass(frozen=True)
class Sample:
    """Frames of really computed pages: ``sealed`` one a row; ``open`` and ``first`` those of one page.

    ``first`` has no rows where a sequence's first page has no form of its own.
    """

    sealed: Tensor
    open: Tensor
    first: Tensor


class Watch:
    """Stands for the engine's runner and keeps the last batch."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.batch: StepBatch | None = None

    def run(self, batch: StepBatch) -> Tensor:
        self.batch = batch
        return self._runner.run(batch)


class _Fill:
    """Stands for the engine's runner: pages of a sample instead of computed ones, logits that say token 0."""

    def __init__(self, pool: PagedPool, sample: Sample) -> None:
        self._pool = pool
        self._sample = sample

    def run(self, batch: StepBatch) -> Tensor:
        buffer, layout, sample = self._pool.buffer, batch.layout, self._sample
        for s in range(len(layout.counts)):
            if layout.counts[s] == 1:
                continue  # a sequence that decodes along; its pages are there
            sealed = [frame for frame in layout.sealed[s].tolist() if frame >= 0]
            for first in range(0, len(sealed), len(sample.sealed)):
                part = sealed[first : first + len(sample.sealed)]
                buffer[part] = sample.sealed[: len(part)]
            buffer[layout.tail[s].tolist()] = sample.open
            if len(sample.first) and layout.sink.shape[1]:
                buffer[layout.sink[s].tolist()] = sample.first
        return torch.zeros(len(batch.logits_rows), self._pool.geometry.vocab_size)


def sample_pages(loaded: LoadedModel, dtype: str) -> Sample:
    """Compute a few pages of real text and copy them."""
    length = SAMPLE_PAGES * PAGE_TOKENS + PAGE_TOKENS // 2
    engine = Engine(loaded, _config(loaded, dtype, 1, length + 2, length))
    watch = Watch(engine._runner)
    engine._runner = watch
    engine.add_request(text_tokens(loaded)[:length], SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    assert watch.batch is not None
    layout, buffer = watch.batch.layout, engine.pool.buffer
    sealed = [frame for frame in layout.sealed[0].tolist() if frame >= 0]
    return Sample(buffer[sealed].clone(), buffer[layout.tail[0].tolist()].clone(), buffer[layout.sink[0].tolist()])


def _config(loaded: LoadedModel, dtype: str, sequences: int, longest: int, budget: int) -> EngineConfig:
    return EngineConfig(
        kv_cache_dtype=dtype,
        kv_cache_memory=pool_bytes(loaded, dtype, sequences, longest),
        max_num_seqs=sequences,
        max_num_batched_tokens=budget,
        enable_prefix_caching=False,
    )


class FilledEngine:
    """An engine with room for ``sequences`` sequences of ``longest`` tokens; :meth:`fill` gives it contexts."""

    def __init__(
        self, loaded: LoadedModel, dtype: str, sequences: int, longest: int, sample: Sample, budget: int = 512
    ) -> None:
        self._tokens = text_tokens(loaded)
        self._sample = sample
        self._names = 0
        self.engine = Engine(loaded, _config(loaded, dtype, sequences, longest, budget))

    def fill(self, contexts: Sequence[int], extra: int = 0) -> list[str]:
        """Add sequences that hold ``contexts`` tokens; returns their names.

        With ``extra`` (and one context) the sequence is a prompt of which ``extra`` more tokens are still to be
        computed. Sequences that are there already get a token, as in any step.
        """
        engine, scheduler = self.engine, self.engine.scheduler
        names = []
        for context in contexts:
            start = 97 * self._names % max(1, len(self._tokens) - context - extra)
            prompt = self._tokens[start : start + context + extra]
            assert len(prompt) == context + extra, "the text is too short"
            room = engine.max_model_len - len(prompt)
            params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
            names.append(engine.add_request(prompt, params, request_id=f"filled-{self._names}"))
            self._names += 1
        assert extra == 0 or len(contexts) == 1, "one unfinished prompt at a time"
        runner, budget = engine._runner, scheduler.max_num_batched_tokens
        engine._runner = _Fill(engine.pool, self._sample)  # type: ignore[assignment]
        scheduler.max_num_batched_tokens = sum(contexts) + len(scheduler.running)
        try:
            engine.step()
        finally:
            engine._runner, scheduler.max_num_batched_tokens = runner, budget
        return names

    def step(self) -> tuple[float, list[Delta]]:
        """A real step: its seconds, and what it brought."""
        begin = time.perf_counter()
        deltas = self.engine.step()
        seconds = time.perf_counter() - begin
        assert all(delta.error is None for delta in deltas), deltas
        return seconds, deltas

    def clear(self) -> None:
        """End all sequences."""
        for name in list(self.engine._groups):
            self.engine.abort(name)
        while self.engine.has_unfinished():
            self.engine.step()
