"""Are a call's arguments among the published answers? The rules of the Berkeley Function Calling Leaderboard.

Patil et al., 2023; ``ast_checker.py`` of the leaderboard, for Python. An argument has a list of values that are right,
of one type; an empty string among them means that it may be left out. An integer will do for a float, but no other
type for another. Strings are compared without case, spaces and ``,./-_*^``; so are strings in lists and objects. Of an
object that is right each key has a list of values of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Answers = Sequence[Any]


def arguments_right(given: Mapping[str, Any], expected: Mapping[str, Answers]) -> bool:
    """Whether every argument has a value that is right, and none is missing or made up."""
    return _complete(given, expected) and all(_right(value, expected[name]) for name, value in given.items())


def _complete(given: Mapping[str, Any], expected: Mapping[str, Answers]) -> bool:
    return set(given) <= set(expected) and all(name in given or "" in expected[name] for name in expected)


def _right(value: Any, answers: Answers) -> bool:
    kind = next((type(answer) for answer in answers if answer != ""), str)
    if type(value) is not kind and not (kind is float and type(value) is int):
        return False
    if isinstance(value, Mapping):
        return any(_object(value, answer) for answer in answers if answer != "")
    if isinstance(value, list):
        return any(_array(value, answer) for answer in answers if answer != "")
    return _plain(value) in map(_plain, answers)


def _object(value: Mapping[str, Any], answer: Mapping[str, Answers]) -> bool:
    """Values of an object are compared without their types."""
    return _complete(value, answer) and all(_plain(v) in map(_plain, answer[name]) for name, v in value.items())


def _array(values: Sequence[Any], answer: Sequence[Any]) -> bool:
    return len(values) == len(answer) and all(map(_item, values, answer))


def _item(value: Any, answer: Any) -> bool:
    if isinstance(value, Mapping) and isinstance(answer, Mapping):
        return _object(value, answer)
    return type(value) is type(answer) and bool(_plain(value) == _plain(answer))


def _plain(value: Any) -> Any:
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if isinstance(value, str) else value
