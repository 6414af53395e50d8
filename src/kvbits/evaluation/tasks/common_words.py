"""Which words does a long list hold most often (RULER's common words extraction, arXiv:2404.06654)?"""

from __future__ import annotations

import random

from kvbits.errors import ConfigError
from kvbits.evaluation.probes import Probe
from kvbits.evaluation.tasks.base import SLACK, Material
from kvbits.evaluation.tasks.words import names

COMMON, OFTEN, SELDOM = 10, 30, 3
"""RULER's numbers: ten words thirty times each, all others three times; in a list too short for that five times."""

_LESS_OFTEN = 5
_HEAD = "Below is a numbered list of words. Some of them appear more often than the others. Memorize these.\n\n"


def common_words(material: Material) -> list[Probe]:
    """A list and its ten common words, in the order in which they first appear: a question a document."""
    probes = []
    length = material.longest
    for sample in range(material.samples):
        source = material.random("common-words", sample)
        words = list(names(source))
        example = _asked(source, words[:4], words[4:10], 4, 1)
        common, rest = words[10 : 10 + COMMON], words[10 + COMMON :]
        least = _asked(source, common, rest[:COMMON], OFTEN, SELDOM)
        often = OFTEN if material.size(least) < length // 2 else _LESS_OFTEN
        text, gold = _fitted(material, example, common, rest, often, length, source.random())
        probes.append(material.probe("common-words", str(sample), text, gold, length))
    return probes


def _fitted(
    material: Material, example: str, common: list[str], rest: list[str], often: int, length: int, seed: float
) -> tuple[str, str]:
    """Prompt and answer with as many uncommon words as fit. Raises ``ConfigError`` where not even a few do."""
    count = min(len(rest), length)
    while count >= COMMON:
        asked = _asked(random.Random(seed), common, rest[:count], often, SELDOM)
        prompt, _, gold = f"{example}\n\n{asked}".rpartition(":")
        size = material.size(_HEAD + prompt + gold) + SLACK
        if size <= length:
            return _HEAD + prompt + ":", gold
        count = min(count - 1, count * length // size)
    raise ConfigError(f"the task 'common-words' needs a longer context than {length} tokens")


def _asked(source: random.Random, common: list[str], rest: list[str], often: int, seldom: int) -> str:
    """The list, the question and, after the last colon, the answer."""
    entries = common * often + rest * seldom
    source.shuffle(entries)
    first = list(dict.fromkeys(word for word in entries if word in set(common)))
    listed = " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))
    ask = f"The {len(common)} words that appear most often in this list are, in the order in which they first appear:"
    return f"{listed}\n\n{ask} {', '.join(first)}"
