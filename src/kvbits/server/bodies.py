"""How many bytes of bodies the server holds at once: of many large ones some must wait outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvbits.server.body import SMALL
from kvbits.server.errors import ApiError


class Bodies:
    """Bytes of the bodies that are being read, parsed and tokenized, ``most`` of them in all.

    Beyond these a client still gets its share, all of them by the clients that hold any; and small bodies always do.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes that are held now."""
        return self._held.total()

    @contextmanager
    def holding(self, client: str) -> Iterator[Callable[[int], None]]:
        """Gives a function that takes the bytes of one body as they come; all are given back in the end.

        It raises ``ApiError`` where there is no room.
        """
        own = 0

        def take(size: int) -> None:
            nonlocal own
            own += size
            self._held[client] += size
            sharing = sum(count > 0 for count in self._held.values())
            if own > SMALL and self.total > self._most and self._held[client] > self._most // sharing:
                message = f"more than {self._most} bytes of requests are being read; come again"
                raise ApiError(503, message, code="too_many_bodies", retry_after=1)

        try:
            yield take
        finally:
            self._held[client] -= own
            if not self._held[client]:
                del self._held[client]
