"""What a simulated day was like."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

WAIT = 1.0
"""Seconds in the queue from which a request counts as having waited."""


@dataclass
class Served:
    """One request's fate, times in seconds; ``admitted`` is ``None`` for a request that was refused."""

    arrived: float
    prompt: int
    answer: int
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None
    preemptions: int = 0


@dataclass
class SimulationResult:
    """A whole simulation. ``as_json`` says what its numbers mean."""

    served: list[Served]
    num_frames: int
    seconds: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    peak_held: int = 0
    peak_waiting: int = 0
    peak_running: int = 0
    _busy: float = field(default=0.0, repr=False)
    _running: float = field(default=0.0, repr=False)
    _last: float = field(default=0.0, repr=False)
    _held: int = field(default=0, repr=False)
    _now: int = field(default=0, repr=False)

    def admit(self, served: Served, time: float, cached: int, computed: int) -> None:
        """A request got its frames; ``cached`` of its tokens were there already. Only the first time counts as hits."""
        if served.admitted is None:
            served.admitted = time
            self.cached_tokens += cached
            self.prompt_tokens += cached + computed
        self.computed_tokens += computed

    def queue(self, time: float, waiting: int, running: int) -> None:
        """So many wait and run from now on."""
        self.peak_waiting = max(self.peak_waiting, waiting)
        self.peak_running = max(self.peak_running, running)
        self._pass(time)
        self._now = running

    def hold(self, time: float, held: int) -> None:
        """So many frames are held from now on."""
        self.peak_held = max(self.peak_held, held)
        self._pass(time)
        self._held = held

    def _pass(self, time: float) -> None:
        self._busy += (time - self._last) * self._held
        self._running += (time - self._last) * self._now
        self._last = time

    def as_json(self) -> dict[str, Any]:
        """Plain numbers. Waits are from arrival to admission, ``waited`` those of over a second.

        ``prefix_hit_share`` is the share of prompt tokens that were found in the pool; ``mean_use`` the mean share of
        frames that running requests held.
        """
        done = [s for s in self.served if s.finished is not None]
        waits = np.array([s.admitted - s.arrived for s in done if s.admitted is not None])
        first = np.array([s.first_token - s.arrived for s in done if s.first_token is not None])
        answer = sum(s.answer for s in done)
        return {
            "requests": len(self.served),
            "refused": len(self.served) - len(done),
            "waited": int((waits > WAIT).sum()),
            "wait_mean_s": _mean(waits),
            "wait_p50_s": _quantile(waits, 0.5),
            "wait_p99_s": _quantile(waits, 0.99),
            "first_token_p50_s": _quantile(first, 0.5),
            "first_token_p99_s": _quantile(first, 0.99),
            "preempted": sum(1 for s in done if s.preemptions),
            "preemptions": sum(s.preemptions for s in done),
            "prefix_hit_share": self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0,
            "computed_prompt_tokens": self.computed_tokens,
            "answer_tokens": answer,
            "answer_tokens_per_s": answer / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
            "steps": self.steps,
            "peak_running": self.peak_running,
            "mean_running": self._running / self.seconds if self.seconds else 0.0,
            "peak_waiting": self.peak_waiting,
            "peak_use": self.peak_held / self.num_frames,
            "mean_use": self._busy / self.seconds / self.num_frames if self.seconds else 0.0,
        }


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _quantile(values: NDArray[np.float64], q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else 0.0
