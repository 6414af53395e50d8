"""Frames of a simulated pool, and the pages that requests share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from kvbits.codecs import PoolLayout


class SimulatedPool:
    """Free frames, and full pages by name: in use by so many requests, or idle and given up least recently used first.

    The rules are those of :class:`kvbits.pages.PageManager`. A name stands for a page's tokens and all before them.
    """

    def __init__(self, num_frames: int, layout: PoolLayout) -> None:
        self.num_frames = num_frames
        self.layout = layout
        self.free = num_frames
        self.idle_frames = 0
        self._users: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Frames that can be had: free ones, and those of pages that nobody uses."""
        return self.free + self.idle_frames

    @property
    def held(self) -> int:
        """Frames of running requests."""
        return self.num_frames - self.available

    def match(self, pages: Iterable[int]) -> list[int]:
        """The first of ``pages``, up to one that is not there."""
        found = []
        for page in pages:
            if page not in self._users:
                break
            found.append(page)
        return found

    def idle_among(self, pages: Iterable[int]) -> int:
        """Frames of those of ``pages`` that are idle: using them takes them from what is available."""
        return sum(self._sizes[page] for page in pages if page in self._idle)

    def use(self, pages: Iterable[int]) -> None:
        """One more request names ``pages``, which are all there."""
        for page in pages:
            if page in self._idle:
                del self._idle[page]
                self.idle_frames -= self._sizes[page]
            self._users[page] += 1

    def add(self, page: int, frames: int) -> bool:
        """Make a request's own full page of ``frames`` frames findable; false when there is an equal one already."""
        if page in self._users:
            return False
        self._users[page] = 1
        self._sizes[page] = frames
        return True

    def drop(self, pages: list[int]) -> None:
        """A request no longer names ``pages``; the deepest becomes idle first."""
        for page in reversed(pages):
            self._users[page] -= 1
            if not self._users[page]:
                self._idle[page] = None
                self.idle_frames += self._sizes[page]

    def size(self, pages: Iterable[int]) -> int:
        """Frames of ``pages``."""
        return sum(self._sizes[page] for page in pages)

    def take(self, frames: int) -> None:
        """Take ``frames`` frames, giving up idle pages where it must; they must be available."""
        assert frames <= self.available, (frames, self.available)
        while self.free < frames:
            page, _ = self._idle.popitem(last=False)
            size = self._sizes.pop(page)
            self.free += size
            self.idle_frames -= size
            del self._users[page]
        self.free -= frames

    def give(self, frames: int) -> None:
        """Give ``frames`` frames back."""
        self.free += frames
