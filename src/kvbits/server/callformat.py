"""How a model writes tool calls: read off its own chat template, by letting the template write one.

What stands before, between and after name and arguments is the format; so a family needs no entry anywhere, as long as
its arguments are JSON. Where the template writes none, or writes arguments as anything else, calls are asked for and
read in the format of Hermes 2 Pro.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ID = "\x00"
"""Stands in a format for the id of a call."""

PROBE_NAME, PROBE_KEY, PROBE_VALUE = "probe_tool", "probe_key", "probe_value"
PROBE_IDS = ("probe0001", "probe0002")
_ARGUMENTS = re.compile(rf'\{{\s*"{PROBE_KEY}"\s*:\s*"{PROBE_VALUE}"\s*\}}')
_THOUGHT = re.compile(r"^\s*(?:<think>)?\s*</think>\s*")
_JSON_HEAD = re.compile(r'\[?\s*\{\s*(?:"\w+"\s*:\s*"[^"]*"\s*,\s*)*"\w+"\s*:\s*"$')
MOST_CALLS = 8
"""In an answer that must be calls."""

_LONGEST = 200
"""Characters of each text of a format."""

_CLOSERS = re.compile(r"^[\s}\]]*")


@dataclass(frozen=True)
class CallFormat:
    """The text around calls: ``prefix`` NAME ``middle`` ARGUMENTS, then ``between`` and the next one, then ``suffix``.

    ``between`` is ``None`` where a second call cannot be foreseen.
    """

    prefix: str
    middle: str
    between: str | None
    suffix: str

    @cached_property
    def as_json(self) -> bool:
        """Whether a call is a JSON object of name and arguments, alone or in a list."""
        return _JSON_HEAD.search(self.prefix) is not None and self.middle.lstrip().startswith('"')

    @cached_property
    def begin(self) -> str:
        """What a call begins with and an answer's text does not; empty: a brace at the answer's start."""
        return (_JSON_HEAD.sub("", self.prefix) if self.as_json else self.prefix).partition(ID)[0].strip()

    @cached_property
    def end(self) -> str:
        """What stands behind the call, or behind all of them; empty: the end of the answer."""
        return "" if ID in self.suffix else _CLOSERS.sub("", self.suffix).strip()

    @property
    def texts(self) -> tuple[str, ...]:
        """All that is written around names and arguments."""
        return (self.prefix, self.middle, self.between or "", self.suffix)

    @cached_property
    def head(self) -> re.Pattern[str]:
        """A call from its begin to its arguments; the name and, where the format has it, the id are groups."""
        start = self.prefix[self.prefix.find(self.begin) + len(self.begin) :]
        return _written(start, self.middle)

    @cached_property
    def next(self) -> re.Pattern[str]:
        """What leads from one call's arguments to the next call's name."""
        return _written(self.between or "", self.middle)


HERMES = CallFormat(
    '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>"
)


def probe_tool(described: bool = True) -> dict[str, Any]:
    """The definition of a tool that does not exist; not ``described``, by its name alone."""
    if not described:
        return {"type": "function", "function": {"name": PROBE_NAME}}
    field = {"type": "string", "description": "a text"}
    parameters = {"type": "object", "properties": {PROBE_KEY: field}, "required": [PROBE_KEY]}
    return {
        "type": "function",
        "function": {"name": PROBE_NAME, "description": "a tool", "parameters": parameters},
    }


def probe_call(call_id: str, as_text: bool = False) -> dict[str, Any]:
    """A call of it; ``as_text``: its arguments are text."""
    arguments = {PROBE_KEY: PROBE_VALUE}
    function = {"name": PROBE_NAME, "arguments": json.dumps(arguments) if as_text else arguments}
    return {"id": call_id, "type": "function", "function": function}


def derive(start: str, one: str, two: str | None, ends: Iterable[str]) -> CallFormat | None:
    """The format of what a template made; ``None`` where its arguments are no JSON.

    ``start`` is a conversation ready for an answer, ``one`` and ``two`` the same with an answer of as many probe calls;
    ``ends`` are the texts that end a turn.
    """
    begin = _common(start, one)
    first = _call(one, begin)
    if first is None:
        return None
    name, after_name, arguments, after = first
    suffix = one[after:]
    suffix = suffix[: min((suffix.find(end) for end in ends if end and end in suffix), default=len(suffix))].rstrip()
    prefix = _THOUGHT.sub("", _ids(one[begin:name]))
    middle = _ids(one[after_name:arguments])
    between = None
    if two is not None:
        again = _call(two, begin)
        second = None if again is None else _call(two, again[3])
        if again is not None and second is not None and _ids(two[second[1] : second[2]]) == middle:
            between = _ids(two[again[3] : second[0]])
    found = CallFormat(prefix.lstrip("\n"), middle, between, _ids(suffix))
    # A format without a mark of its own is only told from text by its brace; what is long is another turn.
    told = found.begin or found.as_json
    return found if told and max(map(len, found.texts)) <= _LONGEST else None


def _call(text: str, start: int) -> tuple[int, int, int, int] | None:
    """Where the next call's name begins and ends, and its arguments."""
    name = text.find(PROBE_NAME, start)
    found = _ARGUMENTS.search(text, max(name, 0))
    if name < 0 or found is None:
        return None
    # Some write the name twice: in an id, and then itself.
    later = text.rfind(PROBE_NAME, name, found.start())
    return later, later + len(PROBE_NAME), found.start(), found.end()


def _ids(text: str) -> str:
    for probe in PROBE_IDS:
        text = text.replace(probe, ID)
    return text


def _common(one: str, other: str) -> int:
    """Characters that both begin with, of marks in angles whole ones only."""
    size = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    opened = one.rfind("<", 0, size)
    return opened if opened > one.rfind(">", 0, size) else size


def _written(before: str, middle: str) -> re.Pattern[str]:
    first, second = _loose(before), _loose(middle)
    if "(?P<id>" in first:
        second = second.replace("(?P<id>", "(?:")
    return re.compile(f"{first}(?P<name>[^\\s\"'<>{{}}]+?){second}")


def _loose(text: str) -> str:
    """A pattern of ``text`` with any white space, any numbers, and any id in the place of ids."""
    parts = []
    for piece in re.findall(r"\s+|\d+|\x00|[^\s\d\x00]", text):
        if piece.isspace():
            parts.append(r"\s*")
        elif piece.isdigit():
            parts.append(r"\d+")
        else:
            parts.append(r"(?P<id>[A-Za-z0-9_.:-]+)" if piece == ID else re.escape(piece) + r"\s*" * (piece in "{[,:"))
    return "".join(parts)


def call_rules(
    form: CallFormat,
    tools: Sequence[tuple[str, str]],
    several: bool,
    literal: Callable[[str], str],
) -> str:
    """Lark rules of which ``calls`` is one call, or ``several`` of them.

    ``tools`` are names and the right sides of rules for their arguments; ``literal`` writes a text as Lark.
    """

    def around(text: str) -> str:
        return " CALL_ID ".join(literal(part) if part else "" for part in text.split(ID))

    # Small models that may go on do so for ever.
    more = f" ({around(form.between)} call){{0,{MOST_CALLS - 1}}}" if several and form.between is not None else ""
    lines = [
        f"calls: {around(form.prefix)} call{more} {around(form.suffix)}",
        f"call: {' | '.join(f'tool_{i}' for i in range(len(tools)))}",
    ]
    for index, (name, arguments) in enumerate(tools):
        lines.append(f"tool_{index}: {literal(name)} {around(form.middle)} arguments_{index}")
        lines.append(f"arguments_{index}: {arguments}")
    if any(ID in text for text in form.texts):
        lines.append("CALL_ID: /[a-zA-Z0-9]{9}/")
    return "\n".join(lines)
