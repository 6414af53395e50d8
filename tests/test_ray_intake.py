"""What reaches a replica through the front, without Ray: an application in the replicas' place, and real requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from kvbits.ray import intake
from kvbits.ray.intake import guarded, take
from kvbits.ray.messages import HttpRequest
from kvbits.ray.prefix import block_hashes, prompt_text
from kvbits.server.errors import ApiError
from kvbits.server.options import ServerOptions

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hello " * 100}]}
OPTIONS = ServerOptions(served_model_name="m", api_keys=("k",), max_body=100_000, body_timeout=0.3)
KEY = {"Authorization": "Bearer k", "Content-Type": "application/json"}


class Replicas:
    """Keeps what it is given, as the front does before it calls a replica."""

    def __init__(self, options: ServerOptions = OPTIONS) -> None:
        self.got: list[tuple[HttpRequest, tuple[bytes, ...]]] = []
        self.read = 0
        self._options = options
        self._guarded = guarded(self._front, options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            message = await receive()
            self.read += len(message.get("body", b""))
            return message

        await self._guarded(scope, counted, send)

    async def _front(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.got.append(await take(scope, receive, self._options))
            answer = JSONResponse({"taken": True})
        except ApiError as error:
            answer = error.response()
        await answer(scope, receive, send)


def post(replicas: Replicas, content: Any, headers: dict[str, str] = KEY, method: str = "POST") -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=replicas)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, CHAT, content=content, headers=headers)

    answer = asyncio.run(ask())
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer


def test_a_request_goes_on_whole_with_its_id_and_blocks() -> None:
    replicas, body = Replicas(), json.dumps(ASK).encode()
    answer = post(replicas, body, KEY | {"X-Request-Id": "mine", "X-Other": "y"})
    assert answer.headers["x-request-id"] == "mine"
    (request, blocks), headers = replicas.got[0], dict(replicas.got[0][0].headers)
    assert (request.method, request.path, request.body) == ("POST", CHAT, body)
    assert (headers[b"x-request-id"], headers[b"x-other"]) == (b"mine", b"y")
    assert blocks == block_hashes(prompt_text(body) or "")
    assert len(blocks) > 5
    # An id that is no good is replaced for the replica too.
    answer = post(replicas, body, KEY | {"X-Request-Id": "bad id!"})
    assert dict(replicas.got[1][0].headers)[b"x-request-id"] == answer.headers["x-request-id"].encode()
    assert post(replicas, None, {"Authorization": "Bearer k"}, "GET").status_code == 200
    assert replicas.got[2][1] == ()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json"}, 401),
        (KEY | {"Authorization": "Bearer other"}, 401),
        (KEY | {"Host": "evil.example"}, 421),
        (KEY | {"Content-Type": "text/plain"}, 415),
        (KEY | {"Content-Length": "100001"}, 413),
    ],
)
def test_who_is_refused_is_not_read(headers: dict[str, str], status: int) -> None:
    replicas = Replicas()
    assert post(replicas, b"[" * 100_000, headers).status_code == status
    assert (replicas.read, replicas.got) == (0, [])


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"a":' * 20_000, b"\xff" * 50_000, b'{"seed":' + b"1" * 5000 + b"}", b"NaN", b""]
)
def test_any_body_of_the_right_size_goes_to_a_replica_that_refuses_it(body: bytes) -> None:
    replicas = Replicas()
    assert post(replicas, body).status_code == 200
    assert [(request.body, blocks) for request, blocks in replicas.got] == [(body, ())]


def test_too_much_and_too_slow() -> None:
    async def much() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 10_000

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    replicas = Replicas()
    assert post(replicas, much()).status_code == 413
    assert replicas.read <= 120_000
    answer = post(replicas, slow())
    assert answer.status_code == 408
    assert "within 0.3 seconds" in answer.json()["error"]["message"]
    assert replicas.got == []


def test_large_bodies_are_looked_at_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(size: int) -> list[bool]:
        loop, found = asyncio.get_running_loop(), []

        def look(body: bytes, owner: bytes) -> tuple[bytes, ...]:
            found.append(asyncio._get_running_loop() is loop)
            return ()

        monkeypatch.setattr(intake, "_blocks", look)
        messages = iter([{"type": "http.request", "body": b"x" * size, "more_body": False}])

        async def receive() -> Message:
            return next(messages)

        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"",
                 "headers": [(b"content-type", b"application/json")]}  # fmt: skip
        await take(scope, receive, OPTIONS)
        return found

    assert asyncio.run(scenario(100)) == [True]
    assert asyncio.run(scenario(90_000)) == [False]
