"""How far to trust the guesses for one sequence. No torch."""

from __future__ import annotations

PROBE = 2
"""Tokens guessed after a rest, to see whether it pays again."""

_MEMORY = 0.9
_BELIEF = 2.0
_FIRST_REST = 16
_LONGEST_REST = 256


class Trust:
    """The chance that a guessed token is kept, given that those before it were; recent guesses count most.

    ``belief`` is what is expected before anything was seen. A sequence whose guesses do not pay *rests*: nothing is
    guessed for a number of steps that doubles with each rest in a row, then a short guess tries again.
    """

    def __init__(self, belief: float) -> None:
        self._kept = _BELIEF * belief
        self._lost = _BELIEF * (1.0 - belief)
        self._rest = 0
        self._next_rest = _FIRST_REST
        self._trying = False
        self.rests = 0

    @property
    def chance(self) -> float:
        """From 0 to 1."""
        return self._kept / (self._kept + self._lost)

    def verified(self, drafted: int, accepted: int) -> None:
        """A guess of ``drafted`` tokens was kept up to ``accepted``; tokens after the first wrong one say nothing."""
        self._kept = _MEMORY * self._kept + accepted
        self._lost = _MEMORY * self._lost + (accepted < drafted)
        self._trying = False

    def plan(self, most: int, gain: float, cost: float) -> int:
        """How many tokens to guess in this step, at most ``most``.

        ``gain``: seconds that a kept token saves; ``cost``: seconds that a guessed one takes. A token is guessed while
        the chance that it and all before it are kept makes the gain the larger.
        """
        if self._rest:
            self._rest -= 1
            return 0
        value, count = gain * self.chance, 0
        while count < most and value > cost:
            value *= self.chance
            count += 1
        if count:
            self._next_rest = _FIRST_REST
        if count or not most:
            return count
        if self._trying:
            return min(PROBE, most)
        self.rests += 1
        self._trying = True
        self._rest = self._next_rest
        self._next_rest = min(2 * self._next_rest, _LONGEST_REST)
        return 0
