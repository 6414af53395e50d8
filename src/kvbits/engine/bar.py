"""A progress bar on stderr for work that takes longer than a second. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Bar(AbstractContextManager[Callable[[int], None]]):
    """A progress bar over tokens (or another ``unit``) on stderr; entering it gives the function to advance it."""

    def __init__(self, total: int, label: str, unit: str = "tok") -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True, file=sys.stderr, leave=False, delay=1.0)

    def __enter__(self) -> Callable[[int], None]:
        return self._advance

    def _advance(self, tokens: int) -> None:
        # What is computed again, after a preemption, was not foreseen.
        self._bar.total = max(self._bar.total or 0, self._bar.n + tokens)
        self._bar.update(tokens)

    def __exit__(self, *exception: Any) -> None:
        self._bar.close()


@contextmanager
def no_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """The same without a bar."""
    yield lambda tokens: None
