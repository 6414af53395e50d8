"""Sends requests at their times and waits for all answers."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from kvbits.replay.send import CHAT, TEXT, Record, send
from kvbits.replay.target import Target
from kvbits.replay.trace import TraceRequest

Prompt = str | list[int] | list[dict[str, Any]]


@dataclass(frozen=True)
class LoadShape:
    """How requests are sent.

    ``speed``: times of the trace are divided by it; infinite sends at once. ``rate``: requests per second in the place
    of the trace's times, with exponential gaps by ``seed``. ``concurrency``: most that are open at once. ``extra``:
    fields that every request carries, for example ``temperature``. ``timeout`` of one request in seconds.
    """

    speed: float = float("inf")
    rate: float | None = None
    concurrency: int | None = None
    extra: tuple[tuple[str, Any], ...] = ()
    timeout: float = 3600.0
    seed: int = 0


@dataclass
class Outcome:
    """Records in the order of the requests, and the seconds from the first request to the last answer."""

    records: list[Record]
    seconds: float


def arrivals(requests: Sequence[TraceRequest], load: LoadShape) -> list[float]:
    """Seconds after the start at which each request is sent."""
    if load.rate is None:
        return [r.arrival / load.speed for r in requests]
    gaps, found, now = random.Random(load.seed), [], 0.0
    for _ in requests:
        found.append(now)
        now += gaps.expovariate(load.rate)
    return found


async def replay(
    target: Target,
    requests: Sequence[TraceRequest],
    prompts: Sequence[Prompt],
    load: LoadShape,
    done: Callable[[Record], None] = lambda record: None,
) -> Outcome:
    """Send all; ``done`` is called with each record as it ends."""
    gate = asyncio.Semaphore(load.concurrency or max(1, len(requests)))
    start = time.perf_counter()

    async def one(index: int, when: float, http: aiohttp.ClientSession) -> Record:
        await asyncio.sleep(max(0.0, when - (time.perf_counter() - start)))
        async with gate:
            record = Record(index, time.perf_counter() - start)
            path, body = body_of(target, requests[index], prompts[index], load)
            await send(http, target.url + path, body, record)
        done(record)
        return record

    async with target.client(load.timeout) as http:
        times = arrivals(requests, load)
        records = await asyncio.gather(*[one(i, when, http) for i, when in enumerate(times)])
    return Outcome(list(records), time.perf_counter() - start)


def body_of(target: Target, request: TraceRequest, prompt: Prompt, load: LoadShape) -> tuple[str, dict[str, Any]]:
    """Path and body of a request. A chat goes to the chat endpoint, anything else is completed."""
    body: dict[str, Any] = {"model": target.model, "stream": True, "stream_options": {"include_usage": True}}
    chat = bool(prompt) and isinstance(prompt, list) and isinstance(prompt[0], dict)
    body["messages" if chat else "prompt"] = prompt
    if request.output_tokens:
        body["max_tokens"] = request.output_tokens
    return CHAT if chat else TEXT, body | dict(load.extra)
