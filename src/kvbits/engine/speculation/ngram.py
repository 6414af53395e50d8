"""Guess by looking up: what followed the last tokens when they occurred before (prompt lookup, Saxena 2023). No torch.

Answers that quote their prompt (edited code, extraction, agents that repeat tool output) are guessed well by it.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbits.engine.request import Request
from kvbits.engine.speculation.proposer import Candidate, Proposer


class NgramIndex:
    """For each run of ``shortest`` to ``longest`` tokens of one sequence: where its latest occurrence ended."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._lengths = range(longest, shortest - 1, -1)
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """What followed the longest known run that ``tokens`` ends with; ``tokens`` only grows between calls.

        Where the continuation runs into the end of ``tokens`` it goes on with the guess itself: a repetition.
        """
        size = len(tokens)
        # Only runs that something follows are entered, so the run at the very end never finds itself.
        for end in range(max(self._indexed, 1), size):
            for length in self._lengths:
                if length <= end:
                    self._ends[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, size)
        for length in self._lengths:
            start = self._ends.get(tuple(tokens[size - length :])) if length <= size else None
            if start is not None:
                period = size - start
                return [tokens[start + i % period] for i in range(count)]
        return []


class NgramProposer(Proposer):
    """An index for each sequence; it needs no model."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest, self._longest = shortest, longest
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        guesses = []
        for candidate in candidates:
            request = candidate.request
            index = self._indexes.get(request.seq_id)
            if index is None:
                index = self._indexes[request.seq_id] = NgramIndex(self._shortest, self._longest)
            guesses.append(index.guess(request.tokens, candidate.count))
        return guesses

    def forget(self, request: Request) -> None:
        self._indexes.pop(request.seq_id, None)
