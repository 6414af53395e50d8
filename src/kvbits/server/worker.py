"""The one thread that owns the engine.

The event loop hands it commands through a queue and gets deltas back once a step; nobody else touches the engine.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from kvbits.engine.engine import Engine
from kvbits.engine.params import SamplingParams
from kvbits.engine.stats import EngineLoad, EngineStats
from kvbits.pages import PoolStats
from kvbits.server.errors import ApiError
from kvbits.server.observe import Observer
from kvbits.server.stream import Item, Stream

log = logging.getLogger(__name__)

T = TypeVar("T")
BROKEN = "the engine has stopped after an internal error"
STOPPING = "the server is shutting down"


@dataclass(frozen=True)
class Snapshot:
    """The engine after its last step; read from any thread."""

    load: EngineLoad
    pool: PoolStats
    stats: EngineStats


class EngineWorker:
    """Runs ``engine`` in a thread of its own between :meth:`start` and :meth:`stop`."""

    def __init__(self, engine: Engine, observer: Observer) -> None:
        self.engine = engine
        self.draining = False
        self.broken = False
        self._observer = observer
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="kvbits-engine", daemon=True)
        self.snapshot = self._look()

    # For the event loop

    def start(self) -> None:
        """Start the thread; deltas go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End every request, then the thread."""
        self.draining = True
        self.abort_all(STOPPING)
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)
        if not self.broken:
            # Nobody else touches the engine any more: what is held now would be held for ever.
            self.engine.pages.check()
        pool = self.engine.pages.stats()
        log.info("stopped", extra={"facts": {"frames_held": pool.open + pool.sealed, "frames_cached": pool.cached}})

    @property
    def open_requests(self) -> int:
        """Requests that somebody still listens to."""
        return len(self._streams)

    async def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        salt: str = "",
        client: str = "",
        timeout: float | None = None,
    ) -> Stream:
        """Start a request. Raises ``RequestError`` when it can never be served, ``ApiError`` when not now."""
        self.check_ready()
        stream = Stream(request_id, params.n, self.abort)
        arrived = time.monotonic()

        def add() -> None:
            self.engine.add_request(
                prompt, params, request_id=request_id, priority=priority, salt=salt, client=client, timeout=timeout
            )
            self._streams[request_id] = stream
            self.snapshot = self._look()
            self._observer.arrived(request_id, params.n, arrived)

        try:
            await self.call(add)
        except asyncio.CancelledError:
            self.abort(request_id)
            raise
        return stream

    def check_ready(self) -> None:
        """Raise ``ApiError`` unless new requests are taken."""
        if self.broken:
            raise ApiError(503, BROKEN, code="engine_stopped")
        if self.draining:
            raise ApiError(503, STOPPING, code="shutting_down", retry_after=30)

    async def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the engine's thread, between two steps."""
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            # It belongs to the caller, whatever it is.
            except BaseException as error:
                future.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(future)

    def abort(self, request_id: str) -> None:
        """Drop a request before the next step; unknown ids are fine."""

        def command() -> None:
            self._streams.pop(request_id, None)
            self.engine.abort(request_id)
            self._observer.gone(request_id)

        self._commands.put(command)

    def abort_all(self, message: str) -> None:
        """End every request with an error that says why."""

        def command() -> None:
            for request_id in list(self._streams):
                self.engine.abort(request_id)
                self._observer.gone(request_id)
            self._fail_all(ApiError(503, message, code="shutting_down", retry_after=30))

        self._commands.put(command)

    # The thread

    def _run(self) -> None:
        while True:
            busy = not self.broken and self.engine.has_unfinished()
            if not self._obey(wait=not busy):
                return
            if busy:
                self._step()
            self.snapshot = self._look()

    def _obey(self, wait: bool) -> bool:
        """Run the commands that are there; false: the thread must end."""
        try:
            while True:
                command = self._commands.get(block=wait)
                if command is None:
                    return False
                command()
                wait = False
        except queue.Empty:
            return True

    def _step(self) -> None:
        begin = time.monotonic()
        try:
            deltas = self.engine.step()
        # What the engine does not handle itself leaves it in an unknown state: nothing may run on it any more.
        except Exception:
            log.exception("the engine failed")
            self.broken = True
            self._fail_all(ApiError(503, BROKEN, code="engine_stopped"))
            return
        self._observer.admitted((request.group for request in self.engine.scheduler.running), begin)
        if not deltas:
            return
        self._observer.step(deltas, begin)
        self._deliver([(self._streams[d.request_id], d) for d in deltas if d.request_id in self._streams])
        for request_id in {d.request_id for d in deltas if d.finish_reason is not None}:
            if not self.engine.is_unfinished(request_id):
                self._streams.pop(request_id, None)

    def _fail_all(self, error: ApiError) -> None:
        streams, self._streams = list(self._streams.values()), {}
        self._deliver([(stream, error) for stream in streams])

    def _deliver(self, items: Sequence[tuple[Stream, Item]]) -> None:
        if not items:
            return

        def put() -> None:
            for stream, item in items:
                stream.put(item)

        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:
            # The loop is closed: nobody is left to hear it.
            log.warning("%d deltas came after the end of the event loop", len(items))

    def _look(self) -> Snapshot:
        return Snapshot(self.engine.load(), self.engine.pages.stats(), self.engine.stats)
