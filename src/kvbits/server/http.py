"""Reading bodies, sending events, and noticing that a client went away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvbits.server.errors import ApiError

_encode = json.JSONEncoder(separators=(",", ":")).encode
"""``json.dumps`` with separators makes such an encoder for every call."""

T = TypeVar("T")


class Gone(Exception):
    """The client closed its connection before it had its answer."""


async def read(request: Request, limit: int, timeout: float, take: Callable[[int], None] = lambda size: None) -> bytes:
    """The request's body; ``take`` is told of bytes as they come.

    Raises ``ApiError`` for one that is larger than ``limit`` bytes or comes slower than ``timeout`` seconds, and
    ``Gone``.
    """
    try:
        return await asyncio.wait_for(_body(request, limit, take), timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the request's body did not come within {timeout:g} seconds") from None
    except ClientDisconnect:
        raise Gone from None


async def _body(request: Request, limit: int, take: Callable[[int], None]) -> bytes:
    too_large = ApiError(413, f"the request's body is larger than {limit} bytes", code="request_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated[:20]) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
        take(len(part))
    return bytes(body)


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away. Raises ``Gone`` then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return await task
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone away; what it still sends is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events: each object of ``events`` as JSON, then ``[DONE]``; or ``named``, each by its type, alone.

    An ``ApiError`` becomes the last event. ``done`` is called once, however the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], done: Callable[[], None], named: bool = False) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._done = done
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_gone(receive, self._send(send))
        except Gone:
            pass
        finally:
            self._done()

    async def _send(self, send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            async for event in self._events:
                await write(self._line(event))
        except ApiError as error:
            # Streams of named events have their errors by a type of their own, beside the object that all errors are.
            body = {"type": "error", **error.body(), **error.body()["error"]} if self._named else error.body()
            await write(self._line({**body, "type": "error"} if self._named else body), more=False)
            return
        await write("" if self._named else "data: [DONE]\n\n", more=False)

    def _line(self, event: dict[str, Any]) -> str:
        name = f"event: {event['type']}\n" if self._named else ""
        return f"{name}data: {_encode(event)}\n\n"
