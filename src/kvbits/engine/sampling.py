"""What the sampler must remember of one request: its random stream and the tokens it has seen. No torch."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from kvbits.engine.params import SamplingParams


class SamplingState:
    """One request's random numbers and token counts; it lives as long as the request, through preemptions.

    The ``i``-th sampled token uses the ``i``-th number of the request's own stream (Philox, keyed by its seed and its
    index among the ``n``), so it depends on nothing but the seed and the logits.
    """

    def __init__(self, params: SamplingParams, index: int, prompt: list[int]) -> None:
        self.params = params
        seed = None if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index,))))
        self._ahead: deque[float] = deque()
        self._prompt = prompt
        self._seen: set[int] | None = None
        self._counts: dict[int, int] = {}
        self.matcher = None if params.grammar is None else params.grammar.start()

    def uniform(self) -> float:
        """The next number of the stream, in [0, 1)."""
        return self._ahead.popleft() if self._ahead else float(self._random.random())

    def peek(self, ahead: int) -> float:
        """What :meth:`uniform` will give after ``ahead`` more calls."""
        while len(self._ahead) <= ahead:
            self._ahead.append(float(self._random.random()))
        return self._ahead[ahead]

    def observe(self, token: int) -> None:
        """Count a sampled token."""
        if self.matcher is not None:
            self.matcher.accept(token)
        if self.params.penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
            if self._seen is not None:
                self._seen.add(token)

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.matcher is not None and self.matcher.finished

    def seen(self) -> NDArray[np.int64]:
        """Distinct tokens of prompt and output."""
        if self._seen is None:
            self._seen = {*self._prompt, *self._counts}
        return np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))

    def generated(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct tokens of the output, and how often each came."""
        tokens = np.fromiter(self._counts, dtype=np.int64, count=len(self._counts))
        return tokens, np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
