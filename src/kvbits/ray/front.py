"""The HTTP side of the cluster: reads a request, sends it to a replica, passes the answer on as it comes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable

from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvbits.ray.intake import guarded, take
from kvbits.ray.messages import HttpRequest, Route
from kvbits.ray.metrics import merge
from kvbits.server.errors import ApiError
from kvbits.server.http import disconnected
from kvbits.server.options import ServerOptions

log = logging.getLogger(__name__)

_LOST = (RayActorError, RayServeException, BackPressureError)
"""What a call raises when its replica is gone or not to be reached."""

RETRY_SECONDS = 5
_END_SECONDS = 5
_INTERNAL = ApiError(500, "an internal error; the log has more", code="internal_error")
"""What a client gets whose request made a replica raise, or end without an answer."""


class Front:
    """An ASGI application over the deployment ``deployment``.

    A request whose replica dies before the answer began is sent to another one, ``retries`` times; an answer that has
    begun ends with an error event.
    """

    def __init__(self, deployment: str, application: str, options: ServerOptions, retries: int) -> None:
        self._handle = serve.get_deployment_handle(deployment, application)
        self._options = options
        self._retries = retries

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        if scope["type"] != "http":
            return
        try:
            request, blocks = await take(scope, receive, self._options)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        answer = _Answer(send)
        work = asyncio.ensure_future(self._answer(request, blocks, answer))
        watch = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done:
                # A client may leave as soon as it has the last byte; the call to the replica ends on its own.
                await asyncio.wait({work}, timeout=_END_SECONDS)
            if work.done():
                await work
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)

    async def _answer(self, request: HttpRequest, blocks: tuple[bytes, ...], answer: _Answer) -> None:
        for attempt in range(self._retries + 1):
            try:
                if (request.method, request.path) == ("GET", "/metrics"):
                    await self._metrics(request, answer)
                else:
                    await self._once(request, Route(blocks), answer)
                await answer.end(_INTERNAL)
                return
            except RayTaskError:
                log.exception("a replica failed on %s", request.path)
                await answer.end(_INTERNAL)
                return
            except _LOST as error:
                log.warning("a replica was lost under %s: %s", request.path, type(error).__name__)
                if answer.begun:
                    break
                if attempt < self._retries:
                    await asyncio.sleep(0.1 * 2**attempt)
        message = "the replica that worked on this request was lost"
        await answer.end(ApiError(503, message, code="replica_lost", retry_after=RETRY_SECONDS))

    async def _once(self, request: HttpRequest, route: Route, answer: _Answer) -> None:
        answer.start = None
        stream = self._handle.options(stream=True).http.remote(route, request)
        try:
            async for batch in stream:
                for message in batch:
                    if message["type"] == "http.response.start":
                        route.taken = message["status"] < 400
                    await answer.send(message)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        finally:
            # A client that left early leaves a prompt that was computed, at least in part.
            if route.taken is None:
                route.taken = True

    async def _metrics(self, request: HttpRequest, answer: _Answer) -> None:
        """The metrics of every replica on one page."""
        pages = {}
        for name in await self._handle.names.remote(Route()):
            messages: list[Message] = []
            stream = self._handle.options(stream=True).http.remote(Route(target=name), request)
            async for batch in stream:
                messages += batch
            if messages[0]["status"] != 200:
                for message in messages:
                    await answer.send(message)
                return
            pages[name] = b"".join(message.get("body", b"") for message in messages[1:]).decode()
        await answer.whole(Response(merge(pages), media_type=CONTENT_TYPE_LATEST))


class _Answer:
    """What was passed on so far. The head waits for the first byte, so that another replica can still take over."""

    def __init__(self, send: Callable[[Message], Awaitable[None]]) -> None:
        self._send = send
        self.start: Message | None = None
        self.begun = False
        self.done = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        if not self.begun:
            assert self.start is not None
            self.begun = True
            await self._send(self.start)
        self.done = not message.get("more_body", False)
        await self._send(message)

    async def end(self, error: ApiError) -> None:
        """Close with ``error``: the last event of a stream that has begun, or the whole answer."""
        if self.done:
            return
        if self.begun:
            await self.send({"type": "http.response.body", "body": f"data: {json.dumps(error.body())}\n\n".encode()})
            return
        await self.whole(error.response())

    async def whole(self, response: Response) -> None:
        """An answer that is there already."""
        head = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        await self.send(head)
        await self.send({"type": "http.response.body", "body": response.body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def front_of(deployment: str, application: str, options: ServerOptions, retries: int) -> Callable[[], ASGIApp]:
    """A builder that Ray Serve calls in the front's own process."""

    def build() -> ASGIApp:
        return guarded(Front(deployment, application, options, retries), options)

    return build
