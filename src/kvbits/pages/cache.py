"""The prefix cache: sealed pages found by what they hold, given up when their frames are needed, brought back."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

from kvbits.pages.allocator import FrameAllocator, Frames
from kvbits.pages.prefix import CachedPage, PageHasher, PrefixIndex
from kvbits.pages.tier import PageSource, SecondTier


class PrefixCache:
    """What the pool keeps beyond the sequences that made it.

    ``tier`` gets every page that is given up. ``enabled`` is false: nothing is found and nothing is kept.
    """

    def __init__(
        self,
        allocator: FrameAllocator,
        hasher: PageHasher,
        enabled: bool,
        on_evict: Callable[[CachedPage], None],
        tier: SecondTier | None,
    ) -> None:
        self.enabled = enabled
        self.tier = tier
        self.index = PrefixIndex()
        self.hasher = hasher
        self.evictions = 0
        self._allocator = allocator
        self._on_evict = on_evict
        self._generation = 0

    def root(self, salt: bytes) -> bytes:
        """The hash before a sequence's first page."""
        return self.hasher.root(salt, self._generation)

    def match(self, tokens: Sequence[int], salt: bytes) -> list[CachedPage]:
        """The pages in the pool that ``tokens`` begins with; at least one token is left."""
        found: list[CachedPage] = []
        for key in self.chain(self.root(salt), tokens, 0):
            page = self.index.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def reach(self, tokens: Sequence[int], salt: bytes) -> int:
        """Pages that ``tokens`` begins with, in the pool or in the second tier; at least one token is left."""
        pages = 0
        for key in self.chain(self.root(salt), tokens, 0):
            if self.index.get(key) is None and not (self.tier is not None and self.tier.holds(key)):
                break
            pages += 1
        return pages

    def chain(self, parent: bytes, tokens: Sequence[int], start: int) -> Iterator[bytes]:
        """Hashes of the pages of ``tokens`` from page ``start`` on, after ``parent``; all tokens but the last count."""
        pages = max(len(tokens) - 1, 0) // self.hasher.page_tokens if self.enabled else 0
        return self.hasher.chain(parent, tokens, pages, start)

    def attach(self, page: CachedPage) -> None:
        """One more sequence names ``page``."""
        if page.stamp is not None:
            self.index.make_used(page)
        self._allocator.retain(page.frames)

    def bring(self, source: PageSource, key: bytes, parent: bytes, depth: int, count: int) -> CachedPage | None:
        """Fill ``count`` frames with the page ``key`` of ``source``, for one sequence; ``None`` if it has no such page.

        Older idle pages are given up for it.
        """
        if count > self.available() or not source.holds(key):
            return None
        self.make_free(count)
        frames = self._allocator.take(count)
        good = False
        try:
            good = source.fetch(key, frames)
        finally:
            if not good:
                self._allocator.release(frames)
                self._allocator.put(frames)
        if not good:
            return None
        page = CachedPage(key, parent, depth, frames)
        self.index.insert(page)
        return page

    def seal(self, parent: bytes, tokens: array[int], depth: int, frames: Frames) -> bytes:
        """Index a page that is now full, unless an equal one is: two runs may differ in the last bit, so both stay.

        Returns its hash.
        """
        key = self.hasher.page(parent, tokens)
        if self.index.get(key) is None:
            self.index.insert(CachedPage(key, parent, depth, frames))
        return key

    def release(self, frames: Frames) -> None:
        """A sequence less names the sealed page in ``frames``."""
        if not self._allocator.release(frames):
            return
        page = self.index.at(frames[0])
        if page is None:
            self._allocator.put(frames)
        else:
            self.index.make_idle(page)

    def available(self) -> int:
        """Frames that can be had: free ones, and cached ones without an owner."""
        return self._allocator.free + self.index.idle_frames

    def make_free(self, count: int) -> None:
        """Give up idle pages until ``count`` frames are free; there must be enough."""
        while self._allocator.free < count:
            self._evict()

    def clear(self) -> None:
        """Forget everything; pages that sequences name are found by nobody any more."""
        for page in list(self.index.pages()):
            self.index.remove(page)
            if page.stamp is not None:
                self._allocator.put(page.frames)
        if self.tier is not None:
            self.tier.clear()
        self._generation += 1

    def _evict(self) -> None:
        page = self.index.oldest()
        self._on_evict(page)
        if self.tier is not None:
            self.tier.keep(page.hash, page.frames)
        self.index.remove(page)
        self._allocator.put(page.frames)
        self.evictions += 1
