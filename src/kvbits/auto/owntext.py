"""The text that a model writes to be measured on: prose, speech, code and other languages, and no loops.

Left to itself, from the token that begins a text, a tuned model writes boilerplate and repeats itself. It is certain of
every token of that, whatever the cache: Qwen2.5-Coder-0.5B's `int4` loses five times less there than on prose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvbits.evaluation.selftext import write_windows
from kvbits.models import LoadedModel

TEXTS = 8
"""Texts in a window, each from another start."""

REPETITION_PENALTY = 1.1

STARTS = (
    "The history of the town begins in",
    "Abstract. In this paper we",
    '"I never said that," she answered, and',
    "import os\n\n\ndef ",
    "Dear Dr. Weber,\n\nthank you for",
    "Question: Why does ice float on water?\nAnswer:",
    "The government announced on Tuesday that",
    "Ingredients:\n- 2 cups of",
    "The film, directed by",
    "La ville se trouve",
    "Theorem 1. Let",
    "Once upon a time, in a",
    "The battle of",
    "User: How do I",
    "Her second album was",
    "| Year | Population |\n|---|---|\n",
)
"""How the texts begin."""


def own_windows(
    loaded: LoadedModel, context: int, count: int, progress: Callable[[int], None], seed: int = 0
) -> Sequence[Sequence[int]]:
    """``count`` windows of ``context`` token ids; raises as :func:`kvbits.evaluation.selftext.write_windows`."""
    return write_windows(loaded, context, count, seed, progress, min(TEXTS, context), STARTS, REPETITION_PENALTY)
