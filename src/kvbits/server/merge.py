"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from kvbits.engine.outputs import Delta
from kvbits.server.errors import ApiError
from kvbits.server.stream import Stream


async def merge(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of all ``streams`` as they come, each with its stream's number; raises the first ``ApiError``."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | ApiError | None] = asyncio.Queue()

    async def pump(number: int, stream: Stream) -> None:
        try:
            async for delta in stream:
                queue.put_nowait((number, delta))
            queue.put_nowait(None)
        except ApiError as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, ApiError):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
