"""Tool calls: the grammar that forces them, and finding them in the text that the model writes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbits.engine.grammar import SAME_LINE, json_rule, literal
from kvbits.engine.stops import overlap
from kvbits.server.protocol.chat import Tool

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass
class Call:
    """A call that the model made; ``arguments`` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """OpenAI's format; ``index`` is its place in a stream."""
        call = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if index is None else {"index": index, **call}


class CallParser:
    """Splits a growing text into what is said and what is called.

    A call is what stands between ``<tool_call>`` and ``</tool_call>``, if it is a JSON object with a name; anything
    else stays text, tags included. Blanks before and after calls belong to neither.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._searched = 0
        self._skip_blanks = True

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text and the calls that are certain after ``text`` came."""
        self._held += text
        said = ""
        calls: list[Call] = []
        while True:
            if not self._inside:
                before, tag, after = self._held.partition(BEGIN)
                if not tag:
                    keep = overlap(self._held, BEGIN)
                    cut = len(self._held) - keep
                    said += self._say(self._held[:cut])
                    self._held = self._held[cut:]
                    return said, calls
                said += self._say(before)
                self._held, self._inside, self._searched = after, True, 0
            place = self._held.find(END, self._searched)
            if place < 0:
                # A long call comes in many pieces: what was searched is not searched again.
                self._searched = max(0, len(self._held) - len(END) + 1)
                return said, calls
            body, self._held, self._inside = self._held[:place], self._held[place + len(END) :], False
            call = read_call(body)
            if call is None:
                said += self._say(f"{BEGIN}{body}{END}")
            else:
                calls.append(call)
                self._skip_blanks = True

    def flush(self) -> str:
        """What was still held back when the answer ended."""
        rest = (BEGIN if self._inside else "") + self._held
        self._held, self._inside = "", False
        return self._say(rest)

    def _say(self, text: str) -> str:
        if self._skip_blanks:
            text = text.lstrip()
            self._skip_blanks = not text
        return text


def read_call(body: str) -> Call | None:
    """The call that ``body`` describes, if it does."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return Call(found["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def call_rules(tools: Sequence[Tool], several: bool) -> str:
    """Lark rules of which ``calls`` is one call of ``tools``, or several of them."""
    lines = [
        "calls: call" + (r' ("\n" call)*' if several else ""),
        f"call: {literal(BEGIN)} {literal(chr(10))} ({' | '.join(f'tool_{i}' for i in range(len(tools)))}) "
        f"{literal(chr(10))} {literal(END)}",
    ]
    for index, tool in enumerate(tools):
        head = '{"name": ' + json.dumps(tool.function.name) + ', "arguments": '
        lines.append(f"tool_{index}: {literal(head)} arguments_{index} {literal('}')}")
        lines.append(f"arguments_{index}: {json_rule(_parameters(tool), SAME_LINE)}")
    return "\n".join(lines)


def _parameters(tool: Tool) -> dict[str, Any]:
    given = tool.function.parameters
    return (
        {"properties": {}, "additionalProperties": False, "type": "object"}
        if given is None
        else {"type": "object", **given}
    )
