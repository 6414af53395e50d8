"""What is sent and when: production traces and files of prompts.

Formats, told apart by what is in the file:

- traces of Mooncake (.jsonl) and Azure (.csv), as :mod:`kvbits.traces` has them
- prompts (.jsonl or .json): ``prompt`` or ``messages``; conversations of ShareGPT; ``turns`` of MT-Bench
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvbits.errors import ConfigError
from kvbits.traces import parse_trace, read_lines

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
    """The requests of a file, in order of arrival. Raises ``ConfigError`` for a file that is none of the formats.

    Traces are read by :func:`kvbits.traces.read_trace`; here an answer has at least one token.
    """
    lines = read_lines(path)
    arrivals = parse_trace(lines, path)
    if arrivals is not None:
        return [TraceRequest(a.time, a.prompt, max(1, a.answer), a.blocks) for a in arrivals]
    try:
        found = [_prompt(row) for row in _rows(lines)]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
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


def _rows(lines: Sequence[str]) -> list[Any]:
    filled = [line for line in lines if line.strip()]
    try:
        rows = [json.loads(line) for line in filled]
    except ValueError:
        # One JSON value over several lines.
        whole = json.loads("\n".join(lines))
        rows = whole if isinstance(whole, list) else [whole]
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows


def _prompt(row: dict[str, Any]) -> TraceRequest:
    arrival = float(row.get("timestamp", 0)) / 1000
    if not math.isfinite(arrival):
        raise ValueError(f"the time is {arrival}")
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
