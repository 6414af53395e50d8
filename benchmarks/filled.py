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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbits.config import PAGE_TOKENS
from kvbits.engine.batch import StepBatch
from kvbits.engine.model_runner import ModelRunner
from kvbits.engine.outputs import Delta
from kvbits.engine.params import SamplingParams
from kvbits.evaluation.compare import engine_for
from kvbits.evaluation.documents import reference_text
from kvbits.models import LoadedModel

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

    ``first`` has no rows where a sequence's first page has no format of its own.
    """

    sealed: tuple[Tensor, ...]
    open: Tensor
    first: Tensor


class FillingRunner(ModelRunner):
    """Keeps the last batch; while it has a ``sample``, a step stores its pages instead of computed ones."""

    batch: StepBatch | None = None
    sample: Sample | None = None

    def run(self, batch: StepBatch) -> Tensor:
        self.batch = batch
        return super().run(batch) if self.sample is None else self._fill(batch, self.sample)

    def _fill(self, batch: StepBatch, sample: Sample) -> Tensor:
        """Logits say token 0."""
        buffer, layout = self._pool.buffer, batch.layout
        for s in range(len(layout.counts)):
            if layout.counts[s] == 1:
                continue  # a sequence that decodes along; its pages are there
            for row, pages in zip(layout.sealed[s :: len(layout.counts)], sample.sealed, strict=True):
                sealed = _frames(row)
                for first in range(0, len(sealed), len(pages)):
                    part = sealed[first : first + len(pages)]
                    buffer[part] = pages[: len(part)]
            buffer[layout.tail[s].tolist()] = sample.open
            if len(sample.first) and layout.sink.shape[1]:
                buffer[layout.sink[s].tolist()] = sample.first
        return torch.zeros(len(batch.logits_rows), self._pool.geometry.vocab_size)


def _frames(row: NDArray[np.int32]) -> list[int]:
    return [int(frame) for frame in row if frame >= 0]


def sample_pages(loaded: LoadedModel, dtype: str) -> Sample:
    """Compute a few pages of real text and copy them."""
    length = SAMPLE_PAGES * PAGE_TOKENS + PAGE_TOKENS // 2
    filled = FilledEngine(loaded, dtype, 1, length + 2, budget=length)
    filled.engine.add_request(text_tokens(loaded)[:length], SamplingParams(max_tokens=2, ignore_eos=True))
    filled.engine.step()
    assert filled.runner.batch is not None
    layout, buffer = filled.runner.batch.layout, filled.engine.pool.buffer
    groups = tuple(buffer[_frames(row)].clone() for row in layout.sealed)
    return Sample(groups, *(buffer[part].clone() for part in (layout.tail[0].tolist(), layout.sink[0].tolist())))


class FilledEngine:
    """An engine with room for ``sequences`` sequences of ``longest`` tokens; :meth:`fill` gives it contexts."""

    def __init__(
        self,
        loaded: LoadedModel,
        dtype: str,
        sequences: int,
        longest: int,
        sample: Sample | None = None,
        budget: int = 512,
    ) -> None:
        self._tokens = text_tokens(loaded)
        self._sample = sample
        self._names: list[str] = []
        self.runner: FillingRunner

        def made(*parts: Any) -> ModelRunner:
            self.runner = FillingRunner(*parts)
            return self.runner

        self.engine = engine_for(loaded, loaded.policy(dtype), sequences, longest, budget, runner=made)

    def fill(self, contexts: Sequence[int], extra: int = 0) -> list[str]:
        """Add sequences that hold ``contexts`` tokens; returns their names.

        With ``extra`` (and one context) the sequence is a prompt of which ``extra`` more tokens are still to be
        computed. Sequences that are there already get a token, as in any step.
        """
        engine, scheduler, before = self.engine, self.engine.scheduler, len(self._names)
        assert extra == 0 or len(contexts) == 1, "one unfinished prompt at a time"
        for context in contexts:
            start = 97 * len(self._names) % max(1, len(self._tokens) - context - extra)
            prompt = self._tokens[start : start + context + extra]
            assert len(prompt) == context + extra, "the text is too short"
            params = SamplingParams(max_tokens=engine.max_model_len - len(prompt), temperature=0.0, ignore_eos=True)
            self._names.append(engine.add_request(prompt, params, request_id=f"filled-{len(self._names)}"))
        budget, self.runner.sample = scheduler.max_num_batched_tokens, self._sample
        scheduler.max_num_batched_tokens = sum(contexts) + len(scheduler.running)
        try:
            engine.step()
        finally:
            self.runner.sample, scheduler.max_num_batched_tokens = None, budget
        return self._names[before:]

    def step(self) -> tuple[float, list[Delta]]:
        """A real step: its seconds, and what it brought."""
        begin = time.perf_counter()
        deltas = self.engine.step()
        seconds = time.perf_counter() - begin
        assert all(delta.error is None for delta in deltas), deltas
        return seconds, deltas

    def clear(self) -> None:
        """End all sequences."""
        for name in self._names:
            self.engine.abort(name)
        while self.engine.has_unfinished():
            self.engine.step()
