"""What guesses tokens. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from kvbits.engine.request import Request
from kvbits.engine.sampling import SamplingState


@dataclass(frozen=True)
class Candidate:
    """A sequence that waits for its next token, and how many tokens may be guessed for it (at least one)."""

    request: Request
    sampling: SamplingState
    count: int


class Proposer(ABC):
    """Guesses the next tokens of sequences.

    A guess is one fixed list: verification takes a token exactly when it is the one that the model's own choice, with
    the request's own random number, gives; so whatever is guessed, the answer stays the same.
    """

    cost: float = 0.0
    """Seconds, as measured, that one more token takes to guess, for all candidates of a step together."""

    @abstractmethod
    def propose(self, candidates: Sequence[Candidate]) -> list[list[int]]:
        """For each candidate at most ``count`` tokens to follow ``request.tokens``, perhaps none."""

    @abstractmethod
    def forget(self, request: Request) -> None:
        """The sequence has ended."""
