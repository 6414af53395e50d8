"""Production traces: when requests came, how long they were, and which prefixes they shared."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kvbits.errors import ConfigError

BLOCK_TOKENS = 512
"""Tokens that one entry of ``hash_ids`` of a Mooncake trace stands for."""

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d+)? ?(Z|[+-]\d\d:\d\d)?")

Numbered = Iterable[tuple[int, Any]]


@dataclass(frozen=True)
class Arrival:
    """One request: seconds after the trace began, prompt and answer in tokens.

    ``blocks`` names the prompt's blocks of 512 tokens, the last one perhaps not full: equal names mean equal text from
    the start of the prompt to the end of the block. Empty where the trace does not say.
    """

    time: float
    prompt: int
    answer: int
    blocks: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Arrival]:
    """Read a trace, in the order of arrival, beginning at time 0.

    Mooncake's JSON lines (arXiv:2407.00079; ``timestamp`` in milliseconds, ``input_length``, ``output_length``,
    ``hash_ids``; without times all come at once) or the CSV of Azure's LLM inference traces (arXiv:2311.18677;
    ``TIMESTAMP``, UTC where it names no zone, ``ContextTokens``, ``GeneratedTokens``). Raises ``ConfigError`` naming
    the line that is wrong.
    """
    found = parse_trace(read_lines(path), path)
    if found is None:
        raise ConfigError(
            f"'{path}' is no trace: it begins with neither an object with 'input_length' nor {','.join(_AZURE)}"
        )
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without a byte-order mark. Raises ``ConfigError`` when it cannot be read."""
    try:
        # Not splitlines: a JSON string may hold other characters that end lines, U+2028 for one.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace '{path}': {error}") from error


def parse_trace(lines: list[str], path: Path) -> list[Arrival] | None:
    """What :func:`read_trace` finds in ``lines``; ``None`` where they are of neither format. Raises as it does."""
    first = next((line for line in lines if line.strip()), "")
    if set(_AZURE) <= {name.strip() for name in next(csv.reader([first]))}:
        found = _arrivals(path, _csv(lines), _azure)
    elif _is_mooncake(first):
        found = _arrivals(path, ((i, line) for i, line in enumerate(lines, 1) if line.strip()), _mooncake)
    else:
        return None
    if not found:
        raise ConfigError(f"the trace '{path}' holds no requests")
    found.sort(key=lambda arrival: arrival.time)
    begin = found[0].time
    return [Arrival(a.time - begin, a.prompt, a.answer, a.blocks) for a in found]


def _is_mooncake(line: str) -> bool:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "input_length" in row


def _csv(lines: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(lines)
    names = [name.strip() for name in next(row for row in reader if row)]
    for row in reader:
        if row:
            yield reader.line_num, dict(zip(names, row, strict=False))


def _arrivals(path: Path, rows: Numbered, convert: Any) -> list[Arrival]:
    found: list[Arrival] = []
    number = 0
    try:
        for number, row in rows:  # noqa: B007
            found.append(convert(row))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError, csv.Error) as error:
        raise ConfigError(f"line {number} of the trace '{path}' is wrong: {type(error).__name__}: {error}") from error
    return found


def _mooncake(line: str) -> Arrival:
    row = json.loads(line)
    blocks = tuple(int(block) for block in row.get("hash_ids", ()))
    found = _checked(float(row.get("timestamp", 0)) / 1000, int(row["input_length"]), int(row["output_length"]), blocks)
    if blocks and not (len(blocks) - 1) * BLOCK_TOKENS < found.prompt <= len(blocks) * BLOCK_TOKENS:
        raise ValueError(f"{len(blocks)} hash_ids cannot be {found.prompt} tokens in blocks of {BLOCK_TOKENS}")
    return found


def _azure(row: dict[str, str]) -> Arrival:
    parts = _TIME.fullmatch(row["TIMESTAMP"].strip())
    if parts is None:
        raise ValueError(f"'{row['TIMESTAMP']}' is no time such as 2023-11-16 18:15:46.6805900")
    second, fraction, zone = parts.groups()
    moment = datetime.fromisoformat(second + ("+00:00" if zone in (None, "Z") else zone))
    time = moment.timestamp() + float(f"0{fraction or ''}")
    return _checked(time, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _checked(time: float, prompt: int, answer: int, blocks: tuple[int, ...] = ()) -> Arrival:
    if not math.isfinite(time):
        raise ValueError(f"the time is {time}")
    if prompt < 1 or answer < 0:
        raise ValueError(f"a request of {prompt} prompt and {answer} answer tokens")
    return Arrival(time, prompt, answer, blocks)
