"""Finished parts of a long run, kept in a file, so that a run that was interrupted goes on where it stopped.

One JSON object a line, appended as soon as the part is done. A part is known by a hash of everything that its result
depends on, so a file serves any number of runs and a changed setting simply finds nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kvbits.errors import ConfigError

_BEGIN = b'{"key": "'
"""What every line begins with."""


class ResumeCache:
    """Results by key; without a file they live as long as the object."""

    def __init__(self, path: Path | None = None) -> None:
        """Read what ``path`` holds. Raises ``ConfigError`` when it cannot be read or written or is no such file."""
        self._path = path
        self._found: dict[str, Any] = {}
        if path is None:
            return
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data[: data.rfind(b"\n") + 1]
            lines = whole.decode("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot use the file '{path}' to resume: {error}") from error
        for number, line in enumerate(lines, start=1):
            if line:
                self._read(line, number)
        cut = data[len(whole) :]
        if cut[: len(_BEGIN)] != _BEGIN[: len(cut)]:
            raise ConfigError(f"the file '{path}' holds something else than finished parts; give another to resume")
        try:
            with path.open("ab") as file:
                file.truncate(len(whole))  # a part whose line was cut off runs again
        except OSError as error:
            raise ConfigError(f"cannot use the file '{path}' to resume: {error}") from error

    def _read(self, line: str, number: int) -> None:
        try:
            record = json.loads(line)
            self._found[record["key"]] = record["result"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"line {number} of '{self._path}' is no finished part: {error}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def put(self, key: str, result: Any) -> None:
        """Keep a result (plain types)."""
        self._found[key] = result
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")

    def __getitem__(self, key: str) -> Any:
        return self._found[key]


def key_of(*parts: Any) -> str:
    """24 hex digits that stand for ``parts`` (plain types)."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
