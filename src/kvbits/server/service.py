"""What every route needs: the engine's thread, the preparer, the options."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from starlette.requests import Request

from kvbits.auto.loss import Loss
from kvbits.engine.params import SamplingParams
from kvbits.server.body import SMALL, M, check_type, parse
from kvbits.server.errors import ApiError
from kvbits.server.http import read, unless_gone
from kvbits.server.keys import ANYBODY, Client
from kvbits.server.observe import Observer
from kvbits.server.options import ServerOptions
from kvbits.server.prepare import Preparer
from kvbits.server.protocol.limits import MAX_PRIORITY
from kvbits.server.stream import Stream
from kvbits.server.worker import EngineWorker

T = TypeVar("T")

RETRY_SECONDS = 5
"""What a client is told to wait when the queue is full."""


class Service:
    """The parts of one server."""

    def __init__(self, worker: EngineWorker, preparer: Preparer, observer: Observer, options: ServerOptions) -> None:
        self.worker = worker
        self.preparer = preparer
        self.observer = observer
        self.options = options
        self.started = int(time.time())
        self.loss: Loss | None = None
        self.before_submit: Callable[[list[int], str], Awaitable[None]] | None = None
        self._coming: Counter[str] = Counter()
        engine = worker.engine
        self.model = options.served_model_name
        self.fingerprint = f"{engine.loaded.fingerprint}-{engine.pool.policy.name}"

    async def read(self, request: Request, kind: type[M]) -> M:
        """The request's body; raises ``ApiError``."""
        check_type(request.headers)
        body = await read(request, self.options.max_body, self.options.body_timeout)
        request.state.size = len(body)
        context = self.worker.engine.max_model_len
        if len(body) <= SMALL:
            return parse(body, kind, context)
        return await self.prepare(request, lambda: parse(body, kind, context))

    async def prepare(self, request: Request, function: Callable[[], T]) -> T:
        """Run ``function`` beside the event loop, large requests apart from small ones. Raises ``Gone``."""
        large = request.state.size > SMALL
        return await unless_gone(request.receive, self.preparer.run(function, large))

    def check_model(self, name: str | None) -> None:
        """Raise ``ApiError`` unless ``name`` is what this server serves."""
        if name not in (None, self.model):
            raise ApiError(
                404,
                f"the model '{name}' is not served here; it is '{self.model}'",
                param="model",
                code="model_not_found",
            )

    @contextmanager
    def room(self, sequences: int, client: Client = ANYBODY) -> Iterator[None]:
        """Hold places for ``sequences`` more of ``client`` while they are prepared and submitted.

        Where the queue is full, a client still finds places as long as it has less than its share: all of them, by the
        clients that have sequences. Raises ``ApiError`` when there is no room, or could never be as much.
        """
        self.worker.check_ready()
        most = self.options.max_queue + self.worker.engine.config.max_num_seqs
        if sequences > most:
            raise ApiError(
                400, f"the request is for {sequences} sequences; this server takes at most {most}", param="n"
            )
        load = self.worker.snapshot.load
        there = load.running + load.waiting + self._coming.total()
        own = load.clients.get(client.id, 0) + self._coming[client.id]
        clients = {client.id, *load.clients, *(name for name, count in self._coming.items() if count)}
        if there + sequences > most and own + sequences > most // len(clients):
            message = f"{there} sequences run or wait; {sequences} more would exceed {most}"
            raise ApiError(429, message, code="queue_full", retry_after=RETRY_SECONDS)
        self._coming[client.id] += sequences
        try:
            yield
        finally:
            self._coming[client.id] -= sequences

    def check_priority(self, priority: int | None, client: Client) -> None:
        """Raise ``ApiError`` when a request may not set ``priority``, or not so."""
        if priority and not (self.options.allow_priority or "priority" in client.permissions):
            message = "priority needs a key that permits it in --api-key-file, or a server with --allow-priority"
            raise ApiError(403, message, param="priority", code="permission_denied")
        if abs(priority or 0) > MAX_PRIORITY:
            message = f"priority is {priority}; it must be from {-MAX_PRIORITY} to {MAX_PRIORITY}"
            raise ApiError(400, message, param="priority", code="invalid_value")

    async def submit(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        priority: int | None,
        salt: str | None,
        client: Client = ANYBODY,
    ) -> Stream:
        """Hand a request to the engine, after what ``before_submit`` does with its tokens and salt."""
        salt = self.options.salt(client, salt or "")
        if self.before_submit is not None:
            await self.before_submit(prompt, salt)
        return await self.worker.submit(
            request_id,
            prompt,
            params,
            priority=priority or 0,
            salt=salt,
            client=client.id,
            timeout=self.options.request_timeout,
        )

    def head(self, request_id: str) -> dict[str, Any]:
        """What every completion object begins with."""
        return {
            "id": request_id,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def service_of(request: Request) -> Service:
    """The service of the application that ``request`` came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def client_of(request: Request) -> Client:
    """Who sent ``request``."""
    client = getattr(request.state, "client", ANYBODY)
    assert isinstance(client, Client)
    return client


def note(request: Request, facts: Mapping[str, Any]) -> None:
    """Add ``facts`` to the request's line in the log."""
    with suppress(AttributeError):
        request.state.facts.update(facts)
