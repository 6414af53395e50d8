"""What long-context tasks are made from: text, lengths, depths, data files, and how a prompt is filled up."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvbits.errors import ConfigError
from kvbits.evaluation.probes import Probe


@dataclass(frozen=True)
class Material:
    """Everything a task may draw from.

    ``encode`` gives a prompt's token ids, ``encode_more`` those of text that continues one. ``lengths`` are the prompt
    lengths in tokens of the heat maps; the other tasks use the longest. ``depths`` is how many places, from the start
    to the end of a document, are asked about; ``samples`` how many documents of each kind. ``files`` maps a file name
    or pattern to the user's file.
    """

    encode: Callable[[str], Sequence[int]]
    encode_more: Callable[[str], Sequence[int]]
    text: str
    lengths: tuple[int, ...]
    depths: int = 5
    samples: int = 1
    seed: int = 0
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """The longest prompt, answer included."""
        return max(self.lengths)

    def random(self, *names: object) -> random.Random:
        """A random stream of its own for whatever ``names`` say."""
        return random.Random(f"{self.seed}/{'/'.join(map(str, names))}")

    def size(self, text: str) -> int:
        """Tokens of ``text`` in the middle of a prompt."""
        return len(self.encode_more(text))

    def probe(
        self, task: str, document: str, prompt: str, gold: str, length: int, **labels: int | float | str
    ) -> Probe:
        """A probe; raises ``ConfigError`` when prompt and answer exceed ``length`` tokens."""
        tokens, answer = tuple(self.encode(prompt)), tuple(self.encode_more(gold))
        if len(tokens) + len(answer) > length:
            raise ConfigError(
                f"a question of the task '{task}' takes {len(tokens) + len(answer)} tokens; it was to fit {length}"
            )
        return Probe(task, document, tokens, answer, {"length": length, **labels})


SLACK = 24
"""Tokens left free at joints, where a text splits otherwise than its parts do."""


def depths_of(count: int) -> list[float]:
    """``count`` depths from 0 (the start) to 1 (the end)."""
    return [0.5] if count == 1 else [index / (count - 1) for index in range(count)]


def fill(parts: Iterator[str], budget: int, size: Callable[[str], int], task: str, joint: int = 1) -> list[str]:
    """Parts while they fit ``budget`` tokens, ``joint`` for each that is joined on.

    Raises ``ConfigError`` when the parts run out or not even one fits.
    """
    taken: list[str] = []
    left = budget
    for part in parts:
        need = size(part) + joint
        if need > left:
            if not taken:
                raise ConfigError(f"the task '{task}' needs a context of {need - left} tokens more, or longer")
            return taken
        taken.append(part)
        left -= need
    raise ConfigError(
        f"the text is too short for the task '{task}': {budget - left} of {budget} tokens; give a longer --text"
    )


def spread(parts: Sequence[str], facts: Sequence[str], depths: Sequence[float]) -> list[str]:
    """``parts`` with each fact put in at its depth, facts of equal place in their own order."""
    places = [round(depth * len(parts)) for depth in depths]
    order = sorted(range(len(facts)), key=lambda i: (places[i], i))
    out: list[str] = []
    done = 0
    for index in order:
        out += parts[done : places[index]]
        done = places[index]
        out.append(facts[index])
    return out + list(parts[done:])


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a book, without Project Gutenberg's header and footer, each on one line."""
    text = text.replace("\r\n", "\n")
    begin = re.search(r"\*\*\* ?START OF .*\n", text)
    end = re.search(r"\*\*\* ?END OF .*", text)
    text = text[begin.end() if begin else 0 : end.start() if end else len(text)]
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def from_place(parts: Sequence[str], sample: int, samples: int) -> Iterator[str]:
    """All parts once, from the place where the ``sample``-th of ``samples`` documents begins."""
    start = len(parts) * sample // samples
    yield from parts[start:]
    yield from parts[:start]
