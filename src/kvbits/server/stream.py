"""One request's way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from kvbits.engine.outputs import Delta
from kvbits.server.errors import ApiError

Item = Delta | ApiError


class Stream:
    """Deltas of one request of ``n`` sequences, in order. Belongs to the event loop; only :meth:`put` is called by it.

    Iterating ends after the last delta of every sequence; it raises ``ApiError`` when the request failed.
    """

    def __init__(self, request_id: str, n: int, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._left = n
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self._abort = abort

    def put(self, item: Item) -> None:
        """Add what the engine said."""
        self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while self._left:
            item = await self._queue.get()
            if isinstance(item, ApiError):
                self._left = 0
                raise item
            if item.finish_reason is not None:
                self._left -= 1
            failure = _failure(item)
            if failure is not None:
                self.close()
                raise failure
            yield item

    def close(self) -> None:
        """Nobody wants the rest: let the engine drop the request and free its pages."""
        if self._left:
            self._left = 0
            self._abort(self.request_id)


def _failure(delta: Delta) -> ApiError | None:
    if delta.finish_reason == "error" and (delta.error or "").startswith("the grammar"):
        return ApiError(400, delta.error or "", code="grammar_failed")
    if delta.finish_reason == "error":
        return ApiError(500, delta.error or "the model failed on this request", code="model_error")
    if delta.finish_reason == "abort":
        message = delta.error or "the request was aborted"
        return ApiError(503, message, code="deadline_exceeded" if delta.error else "aborted", retry_after=1)
    return None
