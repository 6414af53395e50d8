"""bAbI's facts hidden in a book, in their order, and the question at the end.

Facts and questions are bAbI's (Weston et al., 2015, arXiv:1502.05698); hiding them in a book follows BABILong (Kuratov
et al., 2024, arXiv:2406.10149).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvbits.errors import ConfigError
from kvbits.evaluation.probes import Probe
from kvbits.evaluation.tasks.base import SLACK, Material, fill, from_place, paragraphs, spread
from kvbits.evaluation.windows import read_text

FILES = ("qa1_*_test.txt", "qa2_*_test.txt")
_HEAD = "Read the text below. Facts about some people are hidden in it.\n\n"


@dataclass(frozen=True)
class Story:
    """Facts, and a question that they answer in one word."""

    facts: tuple[str, ...]
    question: str
    answer: str


def babi(material: Material) -> list[Probe]:
    """``samples`` stories of each file, the facts spread evenly over the book."""
    probes = []
    length = material.longest
    book = paragraphs(material.text)
    for pattern in FILES:
        kind = pattern[:3]
        stories = read_stories(material.files[pattern])
        for sample in range(material.samples):
            story = stories[material.random("babi", kind, sample).randrange(len(stories))]
            used = material.size(_HEAD + "\n\n".join(story.facts) + _tail(story) + f" {story.answer}") + SLACK
            used += 2 * len(story.facts)
            parts = fill(from_place(book, sample, material.samples), length - used, material.size, "babi", joint=2)
            depths = [(i + 0.5) / len(story.facts) for i in range(len(story.facts))]
            text = _HEAD + "\n\n".join(spread(parts, story.facts, depths)) + _tail(story)
            probes.append(material.probe("babi", f"{kind}-{sample}", text, f" {story.answer}", length, kind=kind))
    return probes


def _tail(story: Story) -> str:
    what = story.question.removeprefix("Where is ").rstrip("? ")
    return f"\n\nQuestion: {story.question}\nAnswer: From the facts about the people, {what} is in the"


def read_stories(path: Path) -> list[Story]:
    """Each story with the last of its questions. Raises ``ConfigError`` for a file of another format."""
    stories: list[Story] = []
    facts: list[str] = []
    last: Story | None = None
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        index, _, rest = line.partition(" ")
        if not index.isdigit():
            raise ConfigError(f"line {number} of '{path}' is not of bAbI's form: it has no number")
        if index == "1" and last is not None:
            stories.append(last)
            facts, last = [], None
        question, mark, answer = rest.partition("?")
        if mark:
            parts = answer.replace("|", "\t").split("\t")
            if len(parts) < 2:
                raise ConfigError(f"line {number} of '{path}' is not of bAbI's form: the question has no answer")
            last = Story(tuple(facts), question.strip() + "?", parts[1].strip())
        else:
            facts.append(rest.strip())
    if last is not None:
        stories.append(last)
    if not stories:
        raise ConfigError(f"'{path}' has no question of bAbI's form")
    return stories
