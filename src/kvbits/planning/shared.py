"""Frames of a simulated pool, and the prompt blocks that requests share."""

from __future__ import annotations

from collections import OrderedDict

from kvbits.codecs import PoolLayout
from kvbits.config import PAGE_TOKENS
from kvbits.planning.trace import BLOCK_TOKENS

PAGES = BLOCK_TOKENS // PAGE_TOKENS


class SimulatedPool:
    """Free frames, and blocks by name: in use by so many requests, or idle and given up least recently used first.

    The rules are those of :class:`kvbits.pages.PageManager`, in blocks of 8 pages.
    """

    def __init__(self, num_frames: int, layout: PoolLayout, share: bool) -> None:
        self.num_frames = num_frames
        self.layout = layout
        self.free = num_frames
        self.idle_frames = 0
        self._share = share
        self._users: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Frames that can be had: free ones, and those of blocks that nobody uses."""
        return self.free + self.idle_frames

    @property
    def held(self) -> int:
        """Frames of running requests."""
        return self.num_frames - self.available

    def match(self, blocks: tuple[int, ...], tokens: int) -> int:
        """How many of ``blocks`` a request of ``tokens`` tokens would find; at least one token is left to compute."""
        if not self._share:
            return 0
        most = min(len(blocks), (tokens - 1) // BLOCK_TOKENS)
        found = 0
        while found < most and blocks[found] in self._users:
            found += 1
        return found

    def frames_of_blocks(self, first: int, last: int) -> int:
        """Frames of a prompt's blocks ``first`` to ``last - 1``."""
        layout = self.layout
        extra = layout.first_frames - layout.sealed.frames if first == 0 and last > 0 else 0
        return (last - first) * PAGES * layout.sealed.frames + extra

    def idle_among(self, blocks: tuple[int, ...]) -> int:
        """Frames of those of ``blocks`` that are idle: using them takes them from what is available."""
        return sum(self._sizes[block] for block in blocks if block in self._idle)

    def use(self, blocks: tuple[int, ...]) -> None:
        """One more request names ``blocks``, which are all there."""
        for block in blocks:
            if block in self._idle:
                del self._idle[block]
                self.idle_frames -= self._sizes[block]
            self._users[block] += 1

    def add(self, blocks: tuple[int, ...]) -> list[int]:
        """Make a request's own ``blocks`` findable, as far as they are not yet; returns those that were new."""
        new = []
        for index, block in enumerate(blocks):
            if self._share and block not in self._users:
                self._users[block] = 1
                self._sizes[block] = self.frames_of_blocks(index, index + 1)
                new.append(block)
        return new

    def drop(self, blocks: list[int]) -> None:
        """A request no longer names ``blocks``; the deepest becomes idle first."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._idle[block] = None
                self.idle_frames += self._sizes[block]

    def size(self, blocks: list[int]) -> int:
        """Frames of ``blocks``."""
        return sum(self._sizes[block] for block in blocks)

    def take(self, frames: int) -> None:
        """Take ``frames`` frames, giving up idle blocks where it must; they must be available."""
        assert frames <= self.available, (frames, self.available)
        while self.free < frames:
            block, _ = self._idle.popitem(last=False)
            self.free += self._sizes[block]
            self.idle_frames -= self._sizes.pop(block)
            del self._users[block]
        self.free -= frames

    def give(self, frames: int) -> None:
        """Give ``frames`` frames back."""
        self.free += frames
