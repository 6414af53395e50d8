"""Clients of many kinds at once, some of whom leave: chats, long documents, shared beginnings, grammars, ``n``."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a", "b"]}
WORDS = (
    "the",
    "sea",
    "and",
    "a",
    "ship",
    "went",
    "on",
    "while",
    "cold",
    "wind",
    "blew",
    "from",
    "north",
    "nobody",
    "said",
)


@dataclass
class Mixed:
    """Load on the server at ``url``; ``longest`` is the length of its longest prompts, in words."""

    url: str
    longest: int
    seed: int = 0
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def run(self, seconds: float, clients: int) -> None:
        """Keep ``clients`` busy for so long; a fifth of the requests is cancelled at a random moment."""
        asyncio.run(self._run(seconds, clients))

    async def _run(self, seconds: float, clients: int) -> None:
        end = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=self.url, timeout=600) as http:
            await asyncio.gather(*[self._client(http, random.Random(f"{self.seed} {i}"), end) for i in range(clients)])

    async def _client(self, http: httpx.AsyncClient, chance: random.Random, end: float) -> None:
        while time.monotonic() < end:
            kind, path, body = self._request(chance)
            task = asyncio.create_task(self._ask(http, kind, path, body))
            if chance.random() < 0.2:
                await asyncio.sleep(chance.choice((0.0, 0.02, 0.2, 1.0, 3.0)) * chance.random())
                task.cancel()
                self.done["cancelled"] += 1
            await asyncio.gather(task, return_exceptions=True)
            if task.done() and not task.cancelled() and task.exception() is not None:
                self.faults.append(f"{kind}: {task.exception()!r}")
                # A server that is gone answers at once.
                await asyncio.sleep(0.1)

    async def _ask(self, http: httpx.AsyncClient, kind: str, path: str, body: dict[str, Any]) -> None:
        if body.get("stream"):
            async with http.stream("POST", path, json=body) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            whole = answer.status_code != 200 or lines[-1] == "data: [DONE]"
        else:
            answer = await http.post(path, json=body)
            whole = True
        # A full queue is an answer; anything else that is not one is a fault.
        if answer.status_code not in (200, 429) or not whole:
            self.faults.append(f"{kind}: {answer.status_code} {lines[-1] if body.get('stream') else answer.text[:300]}")
        self.done[f"{kind} {answer.status_code}"] += 1

    def _request(self, chance: random.Random) -> tuple[str, str, dict[str, Any]]:
        def text(words: int) -> str:
            return " ".join(chance.choice(WORDS) for _ in range(words))

        kind = chance.choice(("chat", "chat", "stream", "shared", "document", "schema", "several", "score"))
        asked: dict[str, Any] = {"max_tokens": chance.randint(1, 40), "seed": chance.randrange(1000)}
        if kind == "score":
            prompt = text(self.longest // 4)
            return kind, "/v1/completions", {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0}
        if kind == "document":
            asked |= {"prompt": text(chance.randint(self.longest // 2, self.longest)), "stream": chance.random() < 0.5}
            return kind, "/v1/completions", asked
        if kind == "shared":
            # A few documents that many ask about.
            document = " ".join(random.Random(chance.randrange(4)).choices(WORDS, k=self.longest // 2))
            messages = [{"role": "system", "content": document}, {"role": "user", "content": text(5)}]
            return kind, "/v1/chat/completions", asked | {"messages": messages, "stream": True}
        asked["messages"] = [{"role": "user", "content": text(chance.randint(1, 30))}]
        if kind == "stream":
            asked |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        if kind == "several":
            asked |= {"n": chance.randint(2, 4), "stop": ["sea"]}
        if kind == "schema":
            asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        return kind, "/v1/chat/completions", asked
