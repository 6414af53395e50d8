"""A progress bar on stderr for work that takes long."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from kvbits.engine.stats import EngineStats

_DELAY = 2.0
_INTERVAL = 0.5


class Progress:
    """Prompts done, tokens read and written per second. Quick work shows nothing."""

    def __init__(self, total: int, show: bool, stats: EngineStats) -> None:
        self._bar = tqdm(
            total=total, desc="prompts", unit="prompt", delay=_DELAY, disable=not show, file=sys.stderr, leave=False
        )
        self._stats = stats
        self._begin = self._last = time.perf_counter()
        self._counts = (stats.computed_tokens, stats.generated_tokens)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def done(self) -> None:
        """One prompt is complete."""
        self._bar.update()

    def update(self) -> None:
        """Called once a step."""
        now = time.perf_counter()
        if self._bar.disable or now - self._begin < _DELAY or now - self._last < _INTERVAL:
            return
        counts = (self._stats.computed_tokens, self._stats.generated_tokens)
        computed, generated = ((a - b) / (now - self._last) for a, b in zip(counts, self._counts, strict=True))
        self._last, self._counts = now, counts
        self._bar.set_postfix_str(f"{computed:.0f} tok/s in the model, {generated:.0f} tok/s out")
