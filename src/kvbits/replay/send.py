"""One streamed request and its times."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@dataclass
class Record:
    """What became of one request. Times are seconds; ``begin`` after the start of the run.

    ``between`` are the times between two pieces of the answer. ``digest`` is the SHA-256 of ``text``, the
    whole answer, so that runs can be compared. ``error`` says why it failed.
    """

    index: int
    begin: float
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0
    first: float | None = None
    whole: float = 0.0
    between: list[float] = field(default_factory=list)
    digest: str = ""
    text: str = ""
    error: str | None = None

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first; ``None`` for an answer of one."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.whole - self.first) / (self.output_tokens - 1)

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in seconds."""
        return {
            "index": self.index,
            "begin": round(self.begin, 4),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "ttft": None if self.first is None else round(self.first, 5),
            "latency": round(self.whole, 5),
            "itl_max": round(max(self.between), 5) if self.between else None,
            "digest": self.digest,
            "error": self.error,
        }


async def send(http: aiohttp.ClientSession, url: str, body: dict[str, Any], record: Record) -> None:
    """Send ``body`` as a stream and fill ``record``; whatever fails becomes its ``error``."""
    begin = last = time.perf_counter()
    texts: list[str] = []
    try:
        async with http.post(url, json=body) as answer:
            if answer.status != 200:
                record.error = f"{answer.status} {_message(await answer.read())}"
                return
            ended = False
            async for data in _events(answer.content):
                if data == b"[DONE]":
                    ended = True
                    break
                text = _take(json.loads(data), record)
                if text:
                    now = time.perf_counter()
                    if record.first is None:
                        record.first = now - begin
                    else:
                        record.between.append(now - last)
                    last = now
                    texts.append(text)
            if not ended and record.error is None:
                record.error = "the stream ended without [DONE]"
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError, TypeError) as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        record.whole = time.perf_counter() - begin
        record.output_tokens = record.output_tokens or len(texts)
        record.text = "".join(texts)
        record.digest = hashlib.sha256(record.text.encode("utf-8", "surrogatepass")).hexdigest()


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event. Lines of any length: the reader's own ``readline`` has a limit."""
    rest = b""
    async for part in content.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _take(event: dict[str, Any], record: Record) -> str:
    """Read one event; returns its text."""
    if "error" in event:
        record.error = str((event["error"] or {}).get("message", event["error"]))
        return ""
    usage = event.get("usage")
    if usage:
        record.prompt_tokens = usage.get("prompt_tokens") or record.prompt_tokens
        record.output_tokens = usage.get("completion_tokens") or record.output_tokens
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    text = ""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text += choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
        if delta.get("tool_calls"):
            text += json.dumps(delta["tool_calls"])
    return text


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")[:300]
