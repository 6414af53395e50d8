"""Counters of the engine, for metrics and reports. No torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvbits.engine.speculation.stats import SpeculationStats

PHASES = ("schedule", "model", "sample", "commit")


@dataclass
class EngineStats:
    """Totals since the start.

    ``seconds`` is by phase of a step (and ``draft`` where tokens are guessed), ``finished`` by finish reason.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    finished: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to ``phase``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True)
class EngineLoad:
    """The engine at one moment: sequences by state and by client, and frames of the pool."""

    running: int
    waiting: int
    frames: int
    frames_available: int
    clients: Mapping[str, int] = field(default_factory=dict)

    @property
    def usage(self) -> float:
        """Share of the pool that running sequences hold, from 0 to 1."""
        return 1.0 - self.frames_available / self.frames
