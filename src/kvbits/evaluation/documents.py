"""Long documents with a fact hidden in each: the demo's material.

The text is the Python language reference that ships with CPython (``pydoc_data.topics``): real prose, long, on every
machine. The facts are made up, so a model can only know them by having read them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics

from kvbits.errors import ConfigError

FACTS: tuple[tuple[str, str], ...] = (
    ("Marlin", "48213"),
    ("Cedar", "70956"),
    ("Falcon", "31584"),
    ("Granite", "92640"),
    ("Lotus", "15837"),
    ("Comet", "64719"),
    ("Juniper", "83402"),
    ("Harbor", "27195"),
    ("Saffron", "50368"),
    ("Willow", "96021"),
    ("Obsidian", "12874"),
    ("Tundra", "78350"),
)
"""Made-up places and the access codes that go with them."""


@dataclass(frozen=True)
class Document:
    """A long text with one made-up fact in it, a question that only the text answers, and the answer."""

    text: str
    question: str
    answer: str

    def found_in(self, reply: str) -> bool:
        """Whether ``reply`` names the answer as a number of its own."""
        return re.search(rf"(?<!\d){re.escape(self.answer)}(?!\d)", reply) is not None


def reference_text() -> str:
    """The Python language reference as one text, longest topics first so that related paragraphs stay together."""
    ordered = sorted(topics.values(), key=lambda text: (-len(text), text))
    return "\n\n".join(text.strip() for text in ordered)


def hide_facts(count: int, tokens: int, length: Callable[[str], int], text: str | None = None) -> list[Document]:
    """Cut ``text`` (default: the reference) into ``count`` documents of at least ``tokens`` tokens, a fact in each.

    ``length`` counts tokens of a string. Facts lie at depths spread evenly over the documents, between paragraphs.
    Raises ``ConfigError`` when the text is too short or more documents than made-up facts are asked for.
    """
    if not 1 <= count <= len(FACTS):
        raise ConfigError(f"{count} documents asked for; choose 1 to {len(FACTS)}")
    parts = iter(re.split(r"\n\s*\n", text if text is not None else reference_text()))
    documents = []
    for index, (place, code) in enumerate(FACTS[:count]):
        paragraphs = _take(parts, tokens, length)
        depth = (index + 1) / (count + 1)
        fact = f"Remember this: the access code of the {place} station is {code}."
        paragraphs.insert(round(depth * len(paragraphs)), fact)
        question = f"What is the access code of the {place} station?"
        documents.append(Document("\n\n".join(paragraphs), question, code))
    return documents


def _take(parts: Iterator[str], tokens: int, length: Callable[[str], int]) -> list[str]:
    """The next paragraphs that together make up at least ``tokens`` tokens."""
    taken: list[str] = []
    size = 0
    for part in parts:
        if part.strip():
            taken.append(part)
            size += length(part)
        if size >= tokens:
            return taken
    raise ConfigError(f"the text is too short for another document of {tokens} tokens")


def messages(document: Document) -> list[dict[str, str]]:
    """The conversation that asks the question, for a chat template."""
    content = f"{document.text}\n\nAnswer from the text above in one short sentence. {document.question}"
    return [{"role": "user", "content": content}]
