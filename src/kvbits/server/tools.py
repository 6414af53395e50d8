"""Tool calls: finding them in the text that the model writes."""

from __future__ import annotations

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
_DECODER = json.JSONDecoder()


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
    Blanks before and after calls belong to neither. ``names`` are those of the tools: where a format has no mark of its
    own, an object is a call only of one of these. ``forced``: the whole text is calls, whatever it looks like.
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
        self._started = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The text and the calls that are certain after ``text`` came."""
        self._held += text
        said = ""
        calls: list[Call] = []
        while True:
            if not self._inside and not self._begin():
                keep = overlap(self._held, self._form.begin) if self._form.begin else 0
                cut = len(self._held) - keep
                said += self._say(self._held[:cut])
                self._held = self._held[cut:]
                return said, calls
            if not self._inside:
                before = self._held[: self._place]
                said += self._say(before)
                self._held = self._held[self._place + len(self._form.begin) :]
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

    def flush(self, cut: bool = False) -> tuple[str, list[Call]]:
        """What was still held back when the answer ended; ``cut``: at a limit, maybe inside a call."""
        rest, inside = self._held, self._inside
        self._held, self._inside = "", False
        if not inside:
            return ("", []) if self.forced else (self._say(rest), [])
        found = self._read(rest)
        if found:
            return "", found
        if self.forced or (cut and self._form.begin):
            return "", self._read_cut(rest)
        return self._say(self._form.begin + rest), []

    def _begin(self) -> bool:
        """Whether a call begins in what is held, and where."""
        if self._form.begin:
            self._place = self._held.find(self._form.begin)
            return self._place >= 0
        # Only at the start of the answer, since a brace may stand anywhere.
        self._place = len(self._held) - len(self._held.lstrip())
        began = not self._started and self._held[self._place :].startswith("{")
        self._started = self._started or bool(self._held.strip())
        return began

    def _say(self, text: str) -> str:
        if self._skip_blanks:
            text = text.lstrip()
            self._skip_blanks = not text
        return text

    def _read(self, body: str) -> list[Call]:
        """The calls in ``body``; none where it is no call from its beginning to its end."""
        found = self._read_json(body) if self._form.as_json else []
        found = found or self._read_written(body)
        if not self._form.begin and self._names and any(call.name not in self._names for call in found):
            return []
        return found

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
        if not self._form.begin and not {"arguments", "parameters"} & row.keys():
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
