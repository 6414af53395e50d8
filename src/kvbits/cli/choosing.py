"""The KV cache dtype of a server: chosen or named, with the line that says what it loses."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvbits.cli.session import Bar, note

if TYPE_CHECKING:
    from kvbits.auto.choose import Choice
    from kvbits.auto.wanted import Wanted
    from kvbits.models import LoadedModel

_EVERY = 5.0
"""Seconds between two lines of progress in a log."""


def chosen(loaded: LoadedModel, wanted: Wanted, say: Callable[[str], None] = note) -> Choice:
    """:func:`kvbits.auto.choose.choose` with its progress and its line on stderr, or as ``say`` does it."""
    from kvbits.auto.choose import choose

    def lines(total: int, label: str) -> object:
        return _lines(total, label, say)

    choice = choose(loaded, wanted, Bar if sys.stderr.isatty() else lines, say)  # type: ignore[arg-type]
    say(choice.line)
    return choice


@contextmanager
def _lines(total: int, label: str, say: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Progress for a log that people read later: a line at first and every few seconds, no bar."""
    done, told = 0, time.monotonic()
    say(f"{label} ...")

    def advance(tokens: int) -> None:
        nonlocal done, told
        done += tokens
        if time.monotonic() - told >= _EVERY:
            told = time.monotonic()
            say(f"{label}: {100 * done // total} %")

    yield advance
