"""What the sequences' tables take from the pool and give back to it: open pages, sealed ones, cached ones."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from kvbits.pages.allocator import FrameAllocator, Frames
from kvbits.pages.cache import PrefixCache
from kvbits.pages.groups import GONE, PageShape
from kvbits.pages.prefix import CachedPage, PageHasher
from kvbits.pages.table import SequenceTable
from kvbits.pages.tier import PageSource, SecondTier

Copy = tuple[Frames, Frames]
Move = Callable[[Frames, Frames], None]
OnEvict = Callable[[bytes, int], None]


class PageStore:
    """Every change of a table's frames, and with it of the allocator and the prefix cache.

    The arguments are those of :class:`kvbits.pages.manager.PageManager`; ``goes_on`` is the prefix cache's. ``copies``:
    pages to copy before the next kernel runs; ``moves``: how often sealed pages went to other frames.
    """

    def __init__(
        self,
        num_frames: int,
        open_frames: int,
        shape: PageShape,
        hasher: PageHasher,
        enable_prefix_caching: bool,
        on_evict: OnEvict | None,
        tier: SecondTier | None,
        move: Move | None,
        goes_on: Callable[[bytes], bool] | None,
    ) -> None:
        self.shape = shape
        self.open_frames = open_frames
        self.page_tokens = hasher.page_tokens
        self.tables: dict[int, SequenceTable] = {}
        self.copies: list[Copy] = []
        self.moves = 0
        self.on_evict = on_evict
        self._move = move
        self.allocator = FrameAllocator(num_frames, 1 if move is None else open_frames, kinds=len(shape.groups) + 1)
        self.cache = PrefixCache(
            self.allocator, hasher, enable_prefix_caching, self._evicted, tier, shape.groups, goes_on
        )
        self.index = self.cache.index

    def in_open(self, table: SequenceTable) -> int:
        """Tokens in the open page."""
        return len(table.tokens) % self.page_tokens

    def full_pages(self, table: SequenceTable) -> int:
        """Sealed pages, given back or not."""
        return len(table.tokens) // self.page_tokens

    def sealed_frames(self, table: SequenceTable, pages: int) -> int:
        """Frames of the next ``pages`` pages that ``table`` seals."""
        if not pages:
            return 0
        before = self.full_pages(table)
        return self.shape.total(before + pages) - self.shape.total(before)

    def part(self, table: SequenceTable, page: int, group: int) -> Frames:
        """The frames of one group's part of a sealed page."""
        return tuple(table.sealed[self.shape.part(page, group)])

    def attach(self, table: SequenceTable, keys: Sequence[bytes], source: PageSource | None) -> int:
        """Let ``table`` go on with the pages ``keys``, from the pool or from ``source``: all of them, or none.

        Returns how many of them are there.
        """
        start, end = self.full_pages(table), self.full_pages(table) + len(keys)
        oldest = [group.oldest(end) for group in self.shape.groups]
        frames: list[int] = []
        taken: list[Frames] = []
        parent = table.hash
        try:
            for number, key in enumerate(keys, start):
                for group, first in enumerate(oldest):
                    part = self.shape.part(number, group)
                    if number < first:
                        frames.extend([GONE] * (part.stop - part.start))
                        continue
                    page = self.cache.attach(key, group)
                    if page is None and source is not None:
                        page = self.cache.bring(source, key, parent, number, group)
                    if page is None:
                        return number - start
                    taken.append(page.frames)
                    frames.extend(page.frames)
                parent = key
            self.give_back(table, end)
            table.sealed.extend(frames)
            table.hash = parent
            taken = []
        finally:
            for held in reversed(taken):
                self.cache.release(held)
        return len(keys)

    def give_back(self, table: SequenceTable, pages: int) -> None:
        """Give back the parts that no token sees after ``pages`` sealed pages."""
        if not self.shape.frees:
            return
        stored = self.full_pages(table)
        self.index.tick()
        for number, group in enumerate(self.shape.groups):
            oldest = group.oldest(pages)
            for page in range(table.gone[number], min(oldest, stored)):
                part = self.shape.part(page, number)
                self.cache.release(tuple(table.sealed[part]))
                table.sealed[part] = array("i", [GONE]) * (part.stop - part.start)
            table.gone[number] = oldest

    def crossed(self, table: SequenceTable, count: int) -> int:
        """Pages that are full once ``count`` more tokens are stored."""
        return (self.in_open(table) + count) // self.page_tokens

    def writable(self, table: SequenceTable) -> Frames | None:
        """The open page, if this sequence alone names it."""
        return table.open if table.open is not None and self.allocator.refs[table.open[0]] == 1 else None

    def own_open(self, table: SequenceTable) -> Frames:
        """The table's open page, or a new one: empty, or to be filled from the shared one."""
        own = self.writable(table)
        if own is not None:
            return own
        page = self.take_open()
        if table.open is not None:
            if self.in_open(table):
                self.copies.append((table.open, page))
            self.release_open(table.open)
        return page

    def take_open(self) -> Frames:
        """The frames of a new open page; side by side where there is a ``move``."""
        kind = len(self.shape.groups)
        if self._move is None:
            return self.allocator.take(self.open_frames, kind)
        moves = self.allocator.free_run()
        if moves:
            self.moves += 1
            self._move(tuple(moves), tuple(moves.values()))
            self.index.move(moves)
            for table in self.tables.values():
                table.move(moves)
        return self.allocator.take_run(kind)

    def take_sealed(self, table: SequenceTable, pages: int) -> Frames:
        """Frames of the next ``pages`` pages that ``table`` seals."""
        if not pages:
            return ()
        first = self.full_pages(table)
        parts = [(page, group) for page in range(first, first + pages) for group in range(len(self.shape.groups))]
        taken = (self.allocator.take(self.shape.size(page, group), group) for page, group in parts)
        return tuple(frame for frames in taken for frame in frames)

    def release_open(self, frames: Frames) -> None:
        """A sequence less names the open page in ``frames``."""
        if self.allocator.release(frames):
            self.allocator.put(frames)

    def put_unused(self, frames: Frames) -> None:
        """Give back frames that were taken for a sealed page and hold none."""
        if frames:
            self.allocator.release(frames)
            self.allocator.put(frames)

    def seal(self, table: SequenceTable, number: int) -> None:
        """Page ``number`` of ``table`` is full and its frames are named: let it be found."""
        if self.cache.enabled:
            start = number * self.page_tokens
            tokens = table.tokens[start : start + self.page_tokens]
            parts = (self.part(table, number, group) for group in range(len(self.shape.groups)))
            table.hash = self.cache.seal(table.hash, tokens, number, parts)

    def _evicted(self, page: CachedPage) -> None:
        if self.on_evict is not None:
            for frame in page.frames:
                self.on_evict(page.hash, frame)
