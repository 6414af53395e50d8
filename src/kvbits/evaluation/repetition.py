"""What is wrong with a generated text by itself: repeated n-grams, loops, few distinct words; and where two part."""

from __future__ import annotations

from collections.abc import Sequence

LOOP_TURNS = 3
LOOP_TOKENS = 24
"""A loop is an ending that repeats at least this many times and is at least this long in all."""


def repeated(tokens: Sequence[int], n: int) -> float:
    """Share of the n-grams that have occurred before in the text; 0 for a text shorter than ``n``."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(tokens: Sequence[int], n: int) -> float:
    """Distinct n-grams over all n-grams ("distinct-n", Li et al., 2016); 1 for a text shorter than ``n``."""
    return 1 - repeated(tokens, n)


def loop_length(tokens: Sequence[int]) -> int:
    """Period in tokens of the loop that the text ends in; 0 where it ends in none."""
    for period in range(1, len(tokens) // LOOP_TURNS + 1):
        span = max(LOOP_TURNS * period, LOOP_TOKENS)
        if span > len(tokens):
            return 0
        tail = tokens[-span:]
        if all(tail[i] == tail[i - period] for i in range(period, span)):
            return period
    return 0


def divergence(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """The first place at which two texts differ; their length where they do not."""
    shorter = min(len(tokens), len(reference))
    return next((i for i in range(shorter) if tokens[i] != reference[i]), shorter)
