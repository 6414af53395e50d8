"""What a decode step costs, as measured: a line in its sequences and in its guessed rows. No torch."""

from __future__ import annotations

from collections import deque

import numpy as np

WINDOW = 64
"""Steps that the fit looks back on: contexts grow, sequences come and go."""

_LEAST = 4
_FIRST_BELIEF = 0.02
_EVERY = 4
_OUTLIER = 2.0


class StepCost:
    """Seconds of a decode step: ``base + per sequence + margin x guessed rows``, fitted to the last steps.

    The fit leans towards a belief: that a guessed row costs 2 % of a step at first, later what was found while there
    were guesses. A step that
    took more than twice the median of steps with as many guessed rows counts as twice that median: something else held
    the processor.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, int, float]] = deque(maxlen=WINDOW)
        self._fit = np.zeros(3)
        self._belief = _FIRST_BELIEF
        self._due = 0

    def observe(self, sequences: int, guessed: int, seconds: float) -> None:
        """A step of ``sequences`` next tokens and ``guessed`` rows beside them took ``seconds``."""
        self._steps.append((sequences, guessed, seconds))
        self._due -= 1

    @property
    def tried(self) -> bool:
        """Whether a step with guesses was among those seen."""
        return any(guessed for _, guessed, _ in self._steps) or self._belief != _FIRST_BELIEF

    @property
    def known(self) -> bool:
        """Whether enough steps were seen to say anything."""
        return len(self._steps) >= _LEAST

    def margin(self) -> float:
        """Seconds that one guessed row adds to a step."""
        self._refit()
        return max(float(self._fit[2]), 0.0)

    def step(self, sequences: int) -> float:
        """Seconds of a step of ``sequences`` without guesses; positive."""
        self._refit()
        return max(float(self._fit[0] + self._fit[1] * sequences), 1e-9)

    def _refit(self) -> None:
        if self._due > 0 or not self.known:
            return
        self._due = _EVERY if len(self._steps) >= WINDOW // 4 else 1
        steps = np.array(self._steps)
        median = float(np.median(steps[:, 2]))
        seconds = steps[:, 2].copy()
        for guessed in np.unique(steps[:, 1]):
            alike = steps[:, 1] == guessed
            seconds[alike] = np.minimum(seconds[alike], _OUTLIER * np.median(seconds[alike]))
        rows = np.column_stack([np.ones(len(steps)), steps[:, 0], steps[:, 1]])
        # Two rows of belief: the number of sequences explains nothing, a guessed row costs a little.
        rows = np.vstack([rows, [0.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
        seconds = np.append(seconds, [0.0, self._belief * median])
        self._fit = np.linalg.lstsq(rows, seconds, rcond=None)[0]
        if steps[:, 1].any():
            self._belief = max(float(self._fit[2]), 0.0) / median
