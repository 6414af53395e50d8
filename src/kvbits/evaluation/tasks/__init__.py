"""Long-context tasks: one function each, from material to questions with known answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvbits.evaluation.probes import Probe
from kvbits.evaluation.tasks.babi import FILES as BABI_FILES
from kvbits.evaluation.tasks.babi import babi
from kvbits.evaluation.tasks.base import Material
from kvbits.evaluation.tasks.common_words import common_words
from kvbits.evaluation.tasks.needle import needle
from kvbits.evaluation.tasks.pairs import KV_FILE, LINES_FILE, kv_retrieval, lines, multikey
from kvbits.evaluation.tasks.passkey import passkey
from kvbits.evaluation.tasks.variables import variables


@dataclass(frozen=True)
class Task:
    """``make`` builds the questions; ``needs`` are files it must have, ``uses`` those it takes if they are there."""

    make: Callable[[Material], list[Probe]]
    about: str
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    heat_map: bool = False


TASKS: dict[str, Task] = {
    "passkey": Task(passkey, "one number in a text that repeats itself, by depth and length", heat_map=True),
    "needle": Task(needle, "made-up facts in a book, by depth and length", heat_map=True),
    "kv-retrieval": Task(kv_retrieval, "one UUID's value in a JSON object", uses=(KV_FILE,)),
    "lines": Task(lines, "the number of one line in a long record", uses=(LINES_FILE,)),
    "multikey": Task(multikey, "one magic number in a context full of them"),
    "variables": Task(variables, "chains of assignments"),
    "common-words": Task(common_words, "the words that a long list holds most often"),
    "babi": Task(babi, "facts about people hidden in a book", needs=BABI_FILES),
}
"""One line a task."""

__all__ = ["TASKS", "Material", "Probe", "Task"]
