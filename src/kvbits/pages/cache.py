"""The prefix cache: sealed pages found by what they hold, given up when their frames are needed, brought back."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvbits.pages.allocator import FrameAllocator, Frames
from kvbits.pages.groups import PageGroup, part_key
from kvbits.pages.prefix import CachedPage, PageHasher, PrefixIndex
from kvbits.pages.tier import PageSource, SecondTier


class PrefixCache:
    """What the pool keeps beyond the sequences that made it.

    ``tier`` gets every page that is given up. ``enabled`` is false: nothing is found and nothing is kept. A page has a
    part for each of ``groups``. ``goes_on``: whether a sequence can go on after the page with this hash at all
    (``None``: after every one).
    """

    def __init__(
        self,
        allocator: FrameAllocator,
        hasher: PageHasher,
        enabled: bool,
        on_evict: Callable[[CachedPage], None],
        tier: SecondTier | None,
        groups: Sequence[PageGroup],
        goes_on: Callable[[bytes], bool] | None = None,
    ) -> None:
        self.enabled = enabled
        self.groups = groups
        self.tier = tier
        self.index = PrefixIndex()
        self.hasher = hasher
        self.evictions = 0
        self._allocator = allocator
        self._on_evict = on_evict
        self._goes_on = goes_on
        self._generation = 0

    def root(self, salt: bytes) -> bytes:
        """The hash before a sequence's first page."""
        return self.hasher.root(salt, self._generation)

    def match(self, tokens: Sequence[int], salt: bytes) -> list[bytes]:
        """Hashes of the pages in the pool that ``tokens`` begins with; at least one token is left."""
        return self.longest(self.root(salt), tokens, 0, self.index.__contains__)

    def reach(self, tokens: Sequence[int], salt: bytes) -> int:
        """Pages that ``tokens`` begins with, in the pool or in the second tier; at least one token is left."""
        tier = self.tier
        return len(self.longest(self.root(salt), tokens, 0, lambda k: k in self.index or bool(tier and tier.holds(k))))

    def branch(self, tokens: Sequence[int], salt: bytes) -> int:
        """Pages in the pool that ``tokens`` begins with, whether or not a sequence can go on after them."""
        return len(self.longest(self.root(salt), tokens, 0, self.index.__contains__, lambda key: True))

    def longest(
        self,
        parent: bytes,
        tokens: Sequence[int],
        start: int,
        there: Callable[[bytes], bool],
        goes_on: Callable[[bytes], bool] | None = None,
    ) -> list[bytes]:
        """Hashes of the pages of ``tokens`` from page ``start`` on, after ``parent``, that a sequence can go on after.

        Of every group the parts that the next token sees must be ``there``; of pages before ``start`` they are.
        """
        found: list[bytes] = []
        goes_on, usable = goes_on or self._goes_on, 0
        # Pages in a row, up to the current one, of which each group's part is there.
        rows = [start] * len(self.groups)
        for page, key in enumerate(self.chain(parent, tokens, start)):
            for number, group in enumerate(self.groups):
                if there(part_key(key, number)):
                    rows[number] += 1
                elif group.kept is None:
                    return found[:usable]
                else:
                    rows[number] = 0
            found.append(key)
            pages = start + page + 1
            if goes_on is not None and not goes_on(key):
                continue
            if all(row >= pages - group.oldest(pages) for row, group in zip(rows, self.groups, strict=True)):
                usable = len(found)
        return found[:usable]

    def chain(self, parent: bytes, tokens: Sequence[int], start: int) -> Iterator[bytes]:
        """Hashes of the pages of ``tokens`` from page ``start`` on, after ``parent``; all tokens but the last count."""
        pages = max(len(tokens) - 1, 0) // self.hasher.page_tokens if self.enabled else 0
        return self.hasher.chain(parent, tokens, pages, start)

    def attach(self, key: bytes, group: int) -> CachedPage | None:
        """One more sequence names a group's part of the page ``key``; ``None`` if the pool does not have it."""
        page = self.index.get(part_key(key, group))
        if page is None:
            return None
        if page.stamp is not None:
            self.index.make_used(page)
        self._allocator.retain(page.frames)
        return page

    def bring(self, source: PageSource, key: bytes, parent: bytes, depth: int, number: int) -> CachedPage | None:
        """Fill frames with group ``number``'s part of the page ``key`` of ``source``, for one sequence; ``None`` if it
        has no such page, or there are no frames for it.

        Older idle pages are given up for it.
        """
        count = self.groups[number].frames if depth else self.groups[number].first
        parent, key = self._parent(parent, number), part_key(key, number)
        if count > self.available() or not source.holds(key):
            return None
        self.make_free(count)
        frames = self._allocator.take(count, number)
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

    def seal(self, parent: bytes, tokens: array[int], depth: int, parts: Iterable[Frames]) -> bytes:
        """Index a page that is now full, unless an equal one is: two runs may differ in the last bit, so both stay.

        ``parts``: its frames, group by group. Returns its hash.
        """
        key = self.hasher.page(parent, tokens)
        for number, frames in enumerate(parts):
            if part_key(key, number) not in self.index:
                page = CachedPage(part_key(key, number), self._parent(parent, number), depth, frames)
                self.index.insert(page)
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

    def _parent(self, page: bytes, group: int) -> bytes:
        return part_key(page, group) if self.groups[group].kept is None else b""

    def _evict(self) -> None:
        page = self.index.oldest()
        self._on_evict(page)
        if self.tier is not None:
            self.tier.keep(page.hash, page.frames)
        self.index.remove(page)
        self._allocator.put(page.frames)
        self.evictions += 1
