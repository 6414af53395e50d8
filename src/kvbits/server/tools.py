"""Tool calls: finding them in the text that the model writes."""

from __future__ import annotations

import enum
import json
import re
import secrets
import string
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kvbits.engine.stops import overlap
from kvbits.server.callformat import HERMES, CallFormat

_ARGUMENTS = r'"(?:arguments|parameters)"\s*:\s*'
_CUT = re.compile(
    rf'"(?:name|tool_name)"\s*:\s*"(?P<name>[^"\\]+)"(?:\s*,\s*{_ARGUMENTS}(?P<arguments>.*))?', re.DOTALL
)
_FENCE = "```json"
_FENCED = re.compile(r"```json\s*(.*?)\s*```", re.DOTALL)
_DECODER = json.JSONDecoder()


class _Bare(enum.Enum):
    """Whether the answer so far may be a call without marks."""

    MAYBE = enum.auto()
    YES = enum.auto()
    NO = enum.auto()


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def short_id() -> str:
    """Nine letters and digits, which Mistral's templates demand."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass
class Call:
    """A call that the model made; ``arguments`` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=_new_id)

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """OpenAI's format; ``index`` is its place in a stream."""
        call = {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return call if index is None else {"index": index, **call}


class CallParser:
    """Splits a growing text into what is said and what is called.

    A call is what stands between the format's begin and end, if it is one; anything else stays text, tags included.
    Blanks before and after calls belong to neither. An answer that is nothing but the JSON of a call is one too, if it
    names one of the tools (``names``): some families write no marks, and small models forget them. ``forced``: the
    whole text is calls, whatever it looks like.
    """

    def __init__(
        self, form: CallFormat = HERMES, names: Iterable[str] = (), *, forced: bool = False, short_ids: bool = False
    ) -> None:
        self._form = form
        self._names = frozenset(names)
        self.forced = forced
        self._short_ids = short_ids
        self._held = ""
        self._inside = False
        self._searched = 0
        self._skip_blanks = True
        self._bare = _Bare.MAYBE if self._names else _Bare.NO

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text and the calls that are certain after ``text`` came."""
        self._held += text
        said = ""
        calls: list[Call] = []
        while not self._held_back():
            if not self._inside:
                place = self._held.find(self._form.begin) if self._form.begin else -1
                if place < 0:
                    cut = len(self._held) - (overlap(self._held, self._form.begin) if self._form.begin else 0)
                    said += self._say(self._held[:cut])
                    self._held = self._held[cut:]
                    return said, calls
                said += self._say(self._held[:place])
                self._held = self._held[place + len(self._form.begin) :]
                self._inside, self._searched = True, 0
            end = self._form.end
            place = self._held.find(end, self._searched) if end else -1
            if place < 0:
                # A long call comes in many pieces: what was searched is not searched again.
                self._searched = max(0, len(self._held) - len(end) + 1)
                return said, calls
            body, self._held, self._inside = self._held[:place], self._held[place + len(end) :], False
            found = self._read(body)
            if not found:
                said += self._say(f"{self._form.begin}{body}{end}")
            else:
                calls += found
                self._skip_blanks = True
        return said, calls

    def flush(self, cut: bool = False) -> tuple[str, list[Call]]:
        """What was still held back when the answer ended; ``cut``: at a limit, maybe inside a call."""
        said = ""
        if self._bare is not _Bare.NO:
            found = self._read_bare(self._held, cut)
            if found:
                self._held = ""
                return "", found
            self._bare = _Bare.NO
            said, calls = self.push("")
            if calls:
                return said, calls + self.flush(cut)[1]
        rest, inside = self._held, self._inside
        self._held, self._inside = "", False
        if self.forced and (not inside or not self._form.begin):
            return "", self._read(rest) or self._read_cut(rest)
        if not inside:
            return said + self._say(rest), []
        found = self._read(rest)
        if found or self.forced or cut:
            return said, found or self._read_cut(rest)
        return said + self._say(self._form.begin + rest), []

    def _held_back(self) -> bool:
        """Whether all of the answer so far may be a call without marks."""
        if self.forced and not self._form.begin:
            return True
        if self._bare is _Bare.MAYBE:
            text = self._held.lstrip()
            if text.startswith(("{", _FENCE)):
                self._bare = _Bare.YES
            elif text and not _FENCE.startswith(text):
                self._bare = _Bare.NO
        if self._bare is _Bare.YES and self._form.begin and self._form.begin in self._held:
            self._bare = _Bare.NO
        return self._bare is not _Bare.NO

    def _say(self, text: str) -> str:
        if self._skip_blanks:
            text = text.lstrip()
            self._skip_blanks = not text
        return text

    def _read(self, body: str) -> list[Call]:
        """The calls in ``body``; none where it is no call from its beginning to its end."""
        return (self._read_json(body) if self._form.as_json else []) or self._read_written(body)

    def _read_bare(self, text: str, cut: bool) -> list[Call]:
        """The calls of an answer that is nothing else; of one that was ``cut``, the whole ones."""
        fenced = _FENCED.fullmatch(text.strip())
        found = self._read_json(text if fenced is None else fenced[1])
        if not found and cut:
            head, _, rest = text.rstrip().rpartition("}\n{")
            found = self._read_json(head + "}") if head and rest else []
        return found if all(call.name in self._names for call in found) else []

    def _read_json(self, body: str) -> list[Call]:
        try:
            # Llama's family puts a semicolon between two calls.
            rows = _json_values(body)
        except (ValueError, RecursionError):
            return []
        if len(rows) == 1 and isinstance(rows[0], list):
            rows = rows[0]
        found = [self._of_object(row) for row in rows]
        return [call for call in found if call is not None] if all(found) else []

    def _of_object(self, row: Any) -> Call | None:
        name = row.get("name", row.get("tool_name")) if isinstance(row, dict) else None
        if not isinstance(name, str):
            return None
        if self._bare is not _Bare.NO and not {"arguments", "parameters"} & row.keys():
            return None
        given = row.get("id")
        return self._call(
            name, row.get("arguments", row.get("parameters", {})), given if isinstance(given, str) else None
        )

    def _read_written(self, body: str) -> list[Call]:
        """Calls whose names and arguments stand in the format's own text."""
        found: list[Call] = []
        match = self._form.head.match(body.lstrip())
        text = body.lstrip()
        while match is not None:
            try:
                arguments, place = _DECODER.raw_decode(text, match.end())
            except (ValueError, RecursionError):
                return []
            found.append(self._call(match["name"], arguments, match.groupdict().get("id")))
            match = self._form.next.match(text, place) if self._form.between else None
        return found

    def _read_cut(self, body: str) -> list[Call]:
        """What there is of a call that was cut off: its name at least, and its arguments as far as they came."""
        if self._form.as_json:
            matches = list(_CUT.finditer(body))
            return [self._call(m["name"], m["arguments"] or "") for m in matches[:1]]
        match = self._form.head.match(body.lstrip())
        return [] if match is None else [self._call(match["name"], body.lstrip()[match.end() :])]

    def _call(self, name: str, arguments: Any, call_id: str | None = None) -> Call:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if self._short_ids:
            return Call(name, text, call_id or short_id())
        return Call(name, text)


def _json_values(text: str) -> list[Any]:
    """The JSON values in ``text``, apart by semicolons or white space. Raises ``ValueError``."""
    values, place = [], 0
    while text[place:].strip(" \n\r\t;"):
        place += len(text[place:]) - len(text[place:].lstrip(" \n\r\t;"))
        value, place = _DECODER.raw_decode(text, place)
        values.append(value)
    return values
