"""What the sampler must remember of one request: its random stream and the tokens it has seen. No torch."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from kvbits.engine.params import SamplingParams


class TokenCounts:
    """Distinct tokens, and how often each came, in arrays that grow: counting one more takes constant time."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._tokens = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)

    def add(self, token: int) -> None:
        """Count ``token`` once more."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    def tokens(self) -> NDArray[np.int64]:
        """The distinct tokens, in the order in which they came first."""
        return self._tokens[: len(self._place)]

    def counts(self) -> NDArray[np.float32]:
        """How often each of them came."""
        return self._counts[: len(self._place)]


class SamplingState:
    """One request's random numbers and token counts; it lives as long as the request, through preemptions.

    The ``i``-th sampled token uses the ``i``-th number of the request's own stream (Philox, keyed by its seed and its
    index among the ``n``), so it depends on nothing but the seed and the logits.
    """

    def __init__(
        self, params: SamplingParams, index: int, prompt: list[int], ends: frozenset[int] = frozenset()
    ) -> None:
        self.params = params
        self._ends = np.array(sorted(ends | params.stop_tokens), dtype=np.int64)
        self._output: list[int] = []
        seed = None if params.seed is None else params.seed % 2**64
        self._random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(index,))))
        self._ahead: deque[float] = deque()
        self._prompt = prompt
        self._seen: TokenCounts | None = None
        self._generated = TokenCounts()
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
        self._output.append(token)
        if self.params.penalised:
            self._generated.add(token)
            if self._seen is not None:
                self._seen.add(token)

    def forbidden(self) -> NDArray[np.int64] | None:
        """Tokens that must not come now: ends before ``min_tokens``, last tokens of bad words whose others came."""
        output, bans = self._output, self.params.bans
        early = len(output) < self.params.min_tokens
        last = [ban[-1] for ban in bans if len(ban) == 1 or tuple(output[1 - len(ban) :]) == ban[:-1]]
        if not last:
            return self._ends if early else None
        return np.concatenate([np.array(last, dtype=np.int64), self._ends if early else self._ends[:0]])

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.matcher is not None and self.matcher.finished

    def seen(self) -> NDArray[np.int64]:
        """Distinct tokens of prompt and output."""
        if self._seen is None:
            self._seen = TokenCounts()
            for token in {*self._prompt, *self._generated.tokens().tolist()}:
                self._seen.add(token)
        return self._seen.tokens()

    def generated(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Distinct tokens of the output, and how often each came."""
        return self._generated.tokens(), self._generated.counts()
