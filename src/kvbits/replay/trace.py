"""What is sent and when: production traces and files of prompts.

Formats, told apart by what is in the file:

- Mooncake (.jsonl): ``timestamp`` in ms, ``input_length``, ``output_length``, ``hash_ids`` of blocks of 512 tokens
- Azure LLM inference (.csv): ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``
- prompts (.jsonl or .json): ``prompt`` or ``messages``; conversations of ShareGPT; ``turns`` of MT-Bench
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from kvbits.errors import ConfigError

BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's hashes stands for."""

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class TraceRequest:
    """One request: when it comes (seconds after the first), how long prompt and answer are, and what is known of both.

    ``blocks``: equal numbers stand for equal blocks of 512 prompt tokens (the last may be cut). ``prompt`` or
    ``messages`` where the file holds the text itself; ``prompt_tokens`` is 0 then. ``output_tokens`` 0: not known.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None

    @property
    def has_text(self) -> bool:
        return self.prompt is not None or self.messages is not None


def read_trace(path: Path) -> list[TraceRequest]:
    """The requests of a file, in order of arrival. Raises ``ConfigError`` for a file that is none of the formats."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace '{path}': {error}") from error
    try:
        found = list(_azure(text.splitlines()) if text.startswith("TIMESTAMP") else _rows(text))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"'{path}' is no trace: {type(error).__name__}: {error}; it must be Mooncake's .jsonl, Azure's .csv, or "
            "objects with 'prompt', 'messages', 'conversations' or 'turns'"
        ) from error
    if not found:
        raise ConfigError(f"'{path}' holds no request")
    found.sort(key=lambda request: request.arrival)
    first = found[0].arrival
    return [replace(request, arrival=request.arrival - first) for request in found]


def fitting(requests: Sequence[TraceRequest], context: int | None) -> list[TraceRequest]:
    """Those whose prompt and answer fit ``context`` tokens, as far as their lengths are known."""
    if context is None:
        return list(requests)
    return [r for r in requests if r.prompt_tokens + r.output_tokens <= context]


def capped(requests: Iterable[TraceRequest], output_tokens: int | None) -> list[TraceRequest]:
    """The same with answers of at most ``output_tokens``."""
    if output_tokens is None:
        return list(requests)
    return [replace(r, output_tokens=min(r.output_tokens or output_tokens, output_tokens)) for r in requests]


def _azure(lines: Iterable[str]) -> Iterator[TraceRequest]:
    for row in csv.DictReader(lines):
        when = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26]).timestamp()
        yield _sized(when, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _rows(text: str) -> Iterator[TraceRequest]:
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError:
        # One JSON value over several lines.
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else [whole]
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    for row in rows:
        yield _row(row)


def _row(row: dict[str, Any]) -> TraceRequest:
    if "input_length" in row:
        blocks = tuple(int(b) for b in row.get("hash_ids", ()))
        length = int(row["input_length"])
        if blocks and not (len(blocks) - 1) * BLOCK_TOKENS < length <= len(blocks) * BLOCK_TOKENS:
            raise ValueError(f"{len(blocks)} hash_ids cannot be {length} tokens in blocks of {BLOCK_TOKENS}")
        return _sized(float(row.get("timestamp", 0)) / 1000, length, int(row["output_length"]), blocks)
    arrival = float(row.get("timestamp", 0)) / 1000
    output = int(row.get("max_tokens") or row.get("max_completion_tokens") or row.get("output_length") or 0)
    if "prompt" in row:
        return TraceRequest(arrival, 0, output, prompt=str(row["prompt"]))
    if "turns" in row:
        messages = [{"role": "user", "content": row["turns"][0]}]
    elif "conversations" in row:
        messages = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        if len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages.pop()
    else:
        messages = list(row["messages"])
    return TraceRequest(arrival, 0, output, messages=tuple(messages))


def _sized(arrival: float, prompt: int, output: int, blocks: tuple[int, ...] = ()) -> TraceRequest:
    if prompt < 1 or output < 0:
        raise ValueError(f"a request of {prompt} prompt and {output} new tokens")
    return TraceRequest(arrival, prompt, max(1, output), blocks)
