"""Sequences for tests of the page manager."""

from __future__ import annotations

import random

from kvbits.pages import PageManager


def store(manager: PageManager, seq_id: int, tokens: list[int], salt: bytes = b"") -> int:
    """Open a sequence and store all of ``tokens``; returns what was cached."""
    cached = manager.open(seq_id, tokens, salt)
    extend(manager, seq_id, tokens[cached:])
    return cached


def extend(manager: PageManager, seq_id: int, tokens: list[int]) -> None:
    manager.reserve(seq_id, len(tokens))
    manager.take_copies()
    manager.commit(seq_id, tokens)
    manager.check()


def text(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(50_000), k=length)
