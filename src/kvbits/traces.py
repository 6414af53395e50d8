"""Production traces: when requests came, how long they were, and which prefixes they shared."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kvbits.errors import ConfigError

BLOCK_TOKENS = 512
"""Tokens that one entry of ``hash_ids`` of a Mooncake trace stands for."""

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


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
    ``hash_ids``) or the CSV of Azure's LLM inference traces (arXiv:2311.18677; ``TIMESTAMP``, ``ContextTokens``,
    ``GeneratedTokens``), told apart by their first line. Raises ``ConfigError`` naming the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace '{path}': {error}") from error
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        found = list(_rows(path, ((i, json.loads, line) for i, line in enumerate(lines, 1) if line.strip()), _mooncake))
    elif first.split(",")[: len(_AZURE)] == list(_AZURE):
        rows = ((i, dict, row) for i, row in enumerate(csv.DictReader(lines), 2))
        found = list(_rows(path, rows, _azure))
    else:
        raise ConfigError(f"'{path}' is no trace: it begins with neither a JSON object nor {','.join(_AZURE)}")
    if not found:
        raise ConfigError(f"the trace '{path}' holds no requests")
    found.sort(key=lambda arrival: arrival.time)
    begin = found[0].time
    return [Arrival(a.time - begin, a.prompt, a.answer, a.blocks) for a in found]


def _rows(
    path: Path, rows: Iterator[tuple[int, Callable[[Any], Any], Any]], convert: Callable[[Any], Arrival]
) -> Iterator[Arrival]:
    for number, parse, row in rows:
        try:
            arrival = convert(parse(row))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"line {number} of the trace '{path}' is wrong: {type(error).__name__}: {error}"
            ) from error
        if arrival.prompt < 1 or arrival.answer < 0:
            raise ConfigError(
                f"line {number} of the trace '{path}' has {arrival.prompt} prompt and {arrival.answer} answer tokens"
            )
        yield arrival


def _mooncake(row: dict[str, Any]) -> Arrival:
    blocks = tuple(int(block) for block in row.get("hash_ids", ()))
    return Arrival(float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"]), blocks)


def _azure(row: dict[str, str]) -> Arrival:
    whole, _, fraction = row["TIMESTAMP"].partition(".")
    moment = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc)
    seconds = moment.timestamp() + float(f"0.{fraction or 0}")
    return Arrival(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
