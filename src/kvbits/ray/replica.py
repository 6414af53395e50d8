"""One replica: an engine and the whole OpenAI-compatible application, called with requests instead of a socket."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import Message

from kvbits.auto.choose import named
from kvbits.engine.engine import Engine
from kvbits.engine.transfer import PageBundle, export_pages, import_pages
from kvbits.errors import KVBitsError
from kvbits.ray.messages import HttpRequest, ReplicaStats, Route
from kvbits.ray.options import ReplicaOptions
from kvbits.ray.scaling import USAGE
from kvbits.server.app import create_app
from kvbits.server.service import Service

log = logging.getLogger(__name__)

WORTH_FETCHING = 2
"""Pages that must be missing here before another replica is asked for them."""

_holder: ContextVar[str | None] = ContextVar("holder", default=None)


class Replica:
    """What Ray Serve starts on each machine."""

    def __init__(self, options: ReplicaOptions, deployment: str, fetch_pages: bool = True) -> None:
        loaded = options.load()
        choice = named(loaded, options.engine.kv_cache_dtype)
        log.info(choice.line)
        self._engine = Engine(loaded, replace(options.engine, kv_cache_dtype=choice.policy))
        self._app = create_app(self._engine, options.server, options.loss or choice.loss)
        self._service: Service = self._app.state.service
        # As in a server of its own: the collector need not look at what is there for good.
        gc.collect()
        gc.freeze()
        if fetch_pages:
            self._service.before_submit = self._fetch
        self._deployment = deployment
        self._name = str(serve.get_replica_context().replica_id.unique_id)
        self._application = serve.get_replica_context().app_name
        self._life: Any = None
        self._starting = asyncio.Lock()
        self._fetched_pages = self._fetched_bytes = 0
        self._fetch_seconds = 0.0

    # What Ray Serve asks

    async def check_health(self) -> None:
        """Raises when the engine has stopped: the replica is replaced then."""
        await self._start()
        if self._service.worker.broken:
            raise RuntimeError("the engine has stopped after an internal error")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What :class:`kvbits.ray.scaling.ScalingPolicy` reads."""
        return {USAGE: self._service.worker.snapshot.load.usage}

    def record_routing_stats(self) -> dict[str, float]:
        """What :class:`kvbits.ray.router.Router` reads. Rounded: each change is told to every sender."""
        return {USAGE: round(self._service.worker.snapshot.load.usage, 1)}

    # What the front and other replicas ask

    async def http(self, route: Route, request: HttpRequest) -> AsyncIterator[list[Message]]:
        """The answer as ASGI messages, as they come."""
        await self._start()
        holder = route.holder if route.holder in route.alive and route.holder != self._name else None
        token = _holder.set(holder)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        exchange = _Exchange(request, messages)
        task = asyncio.ensure_future(self._app(exchange.scope, exchange.receive, exchange.send))
        _holder.reset(token)
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            ended = False
            while not ended:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                ended = batch[-1] is None
                yield [message for message in batch if message is not None]
        finally:
            exchange.gone.set()
            await asyncio.wait({task}, timeout=5)
            task.cancel()
            # What the application raises it has logged and answered itself.
            await asyncio.gather(task, return_exceptions=True)

    async def pages(self, route: Route, tokens: list[int], salt: str) -> bytes:
        """The pages of ``tokens`` that this replica has. Large answers travel through Ray's object store."""
        await self._start()
        bundle = await self._service.worker.call(lambda: export_pages(self._engine, tokens, salt))
        return await asyncio.to_thread(bundle.to_bytes)

    async def stats(self, route: Route) -> ReplicaStats:
        """What this replica holds and took from others."""
        await self._start()
        pool = self._service.worker.snapshot.pool
        return ReplicaStats(self._name, pool, self._fetched_pages, self._fetched_bytes, self._fetch_seconds)

    async def names(self, route: Route) -> tuple[str, ...]:
        """All replicas, as the router that sent this knows them; this one alone where it does not."""
        return route.alive or (self._name,)

    # Internals

    async def _start(self) -> None:
        async with self._starting:
            if self._life is None:
                life = self._app.router.lifespan_context(self._app)
                await life.__aenter__()
                self._life = life

    async def _fetch(self, tokens: list[int], salt: str) -> None:
        """Before a request is queued: take its pages from the replica that was given most of its prompt."""
        holder, worker = _holder.get(), self._service.worker
        if holder is None:
            return
        have = await worker.call(lambda: self._engine.pages.lookup(tokens, salt.encode()))
        if (len(tokens) - 1 - have) // self._engine.pages.page_tokens < WORTH_FETCHING:
            return
        handle, began = serve.get_deployment_handle(self._deployment, self._application), time.monotonic()
        try:
            data = await handle.pages.remote(Route(target=holder), tokens, salt)
            bundle = await asyncio.to_thread(PageBundle.from_bytes, data, f"what replica {holder} sent")
            loaded = await worker.call(lambda: import_pages(self._engine, bundle, salt))
        # The holder is gone, or another model or policy replaces it just now: the prompt is computed then.
        except (RayError, RayServeException, KVBitsError) as error:
            log.warning("no pages from replica %s: %s", holder, type(error).__name__)
            return
        self._fetched_pages += max(0, loaded - have) // self._engine.pages.page_tokens
        self._fetched_bytes += len(data)
        self._fetch_seconds += time.monotonic() - began


class _Exchange:
    """An ASGI connection whose request is there already. ``gone`` tells the application that nobody listens."""

    def __init__(self, request: HttpRequest, messages: asyncio.Queue[Message | None]) -> None:
        self.gone = asyncio.Event()
        self._body: bytes | None = request.body
        self._messages = messages
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": request.method,
            "path": request.path,
            "raw_path": request.path.encode(),
            "root_path": "",
            "query_string": request.query,
            "headers": list(request.headers),
            "client": request.client,
            "server": None,
            "state": {},
        }

    async def send(self, message: Message) -> None:
        await self._messages.put(message)

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}
