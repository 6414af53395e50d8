"""The user's data files: finding them and reading JSON lines."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvbits.errors import ConfigError


def find(directory: Path | None, pattern: str) -> Path | None:
    """The first file under ``directory`` whose name fits ``pattern``. Raises ``ConfigError`` for no directory."""
    if directory is None:
        return None
    if not directory.is_dir():
        raise ConfigError(f"the data directory '{directory}' does not exist")
    return min((p for p in directory.rglob(pattern) if p.is_file()), default=None)


def jsonl(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, gzipped or not, each with the fields ``needed``.

    Raises ``ConfigError`` naming what is wrong, and where.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the data file '{path}': {error}") from error
    records = [_record(path, n, line, needed) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not records:
        raise ConfigError(f"the data file '{path}' is empty")
    return records


def _record(path: Path, number: int, line: str, needed: Iterable[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"line {number} of '{path}' is no JSON: {error}") from error
    missing = [name for name in needed if not isinstance(record, dict) or name not in record]
    if missing:
        raise ConfigError(f"line {number} of '{path}' has no {', '.join(missing)}")
    found: dict[str, Any] = record
    return found
