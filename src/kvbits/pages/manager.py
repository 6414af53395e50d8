"""The page manager: sequences, reservations, sharing and eviction over one pool of frames."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from kvbits.config import PAGE_TOKENS
from kvbits.errors import CacheError, OutOfPages
from kvbits.pages.allocator import Frames
from kvbits.pages.check import check_invariants
from kvbits.pages.groups import PageGroup, PageShape
from kvbits.pages.map import frame_map
from kvbits.pages.prefix import PageHasher
from kvbits.pages.states import StateSlots
from kvbits.pages.stats import PoolStats
from kvbits.pages.store import Copy, Move, OnEvict, PageStore
from kvbits.pages.table import Reservation, SequencePages, SequenceTable
from kvbits.pages.tier import PageSource, SecondTier


class PageManager:
    """Decides which frames hold which tokens. Knows integers, not bytes; one thread at a time.

    A step of a sequence is :meth:`reserve`, :meth:`slice`, the copies of :meth:`take_copies`, the kernels, then
    :meth:`commit`. A sealed page is immutable and may be shared; an open page is written by its only owner. What a
    running sequence names is never evicted. A group of layers with a sliding window gives a page back as soon as the
    pages that it does not see any more are sealed: for good, as what is sealed is never cut off.
    """

    def __init__(
        self,
        num_frames: int,
        open_frames: int,
        sealed_frames: int = 1,
        page_tokens: int = PAGE_TOKENS,
        enable_prefix_caching: bool = True,
        cache_key: bytes = b"",
        on_evict: OnEvict | None = None,
        sink_frames: int | None = None,
        tier: SecondTier | None = None,
        groups: Sequence[PageGroup] = (),
        move: Move | None = None,
        states: StateSlots | None = None,
    ) -> None:
        """Manage ``num_frames`` frames, of which an open and a sealed page take ``open_frames`` and ``sealed_frames``.

        ``sink_frames``: what the first page of every sequence takes once it is full, where it has a format of its own.
        ``cache_key`` stands for all that decides a page's bytes besides its tokens: model and policy. ``on_evict`` is
        called with the hash and each frame of a cached page before the frame is used for something else; ``tier`` then
        keeps the page's bytes elsewhere. ``groups``, where layers differ in how long they keep a page: its parts, in
        the place of ``sealed_frames``; ``sink_frames`` is then the sum of their first pages'. With ``move`` an open
        page's frames lie side by side, and ``move`` copies bytes from frames to others at once to make room for them.
        ``states``: the slots of recurrent layers, where the model has such.
        """
        self.shape = PageShape(groups or (PageGroup(sealed_frames, sink_frames),))
        sealed_frames = self.shape.frames
        assert min(num_frames, open_frames, sealed_frames) > 0, (num_frames, open_frames, sealed_frames)
        self.num_frames = num_frames
        self.open_frames = open_frames
        self.sealed_frames = sealed_frames
        self.sink_frames = sink_frames
        assert sink_frames is None or sink_frames == self.shape.first_frames > 0, sink_frames
        self.page_tokens = page_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.states = states
        self._store = PageStore(
            num_frames,
            open_frames,
            self.shape,
            PageHasher(page_tokens, cache_key),
            enable_prefix_caching,
            on_evict,
            tier,
            move,
            None if states is None else states.holds,
        )
        self._allocator, self._cache, self._index = self._store.allocator, self._store.cache, self._store.index
        self._tables = self._store.tables
        self._queries = self._hits = 0

    # Sequences

    def open(self, seq_id: int, tokens: Sequence[int], salt: bytes = b"") -> int:
        """Create a sequence and attach the cached pages that ``tokens`` begins with.

        Returns the number of cached tokens: whole pages, and fewer than ``len(tokens)``, so that at least one token
        is left to compute. No frames are taken, but a slot for states where there are such: ``OutOfPages`` is raised
        when all are in use (:meth:`can_open`), ``CacheError`` if the id is.
        """
        self._new_id(seq_id)
        if self.states is not None:
            self.states.open(seq_id)
        table = SequenceTable(self._cache.root(salt), [0] * len(self.shape.groups))
        if self.states is not None and tokens:
            table.goals = {(len(tokens) - 1) // self.page_tokens, self._cache.branch(tokens, salt)}
        self._tables[seq_id] = table
        found = self._reachable(partial(self._cache.match, tokens, salt))
        cached = self._store.attach(table, found, None) * self.page_tokens
        table.tokens.extend(tokens[:cached])
        self._load_state(seq_id, table, 0)
        if self.enable_prefix_caching:
            self._queries += len(tokens)
            self._hits += cached
        return cached

    def restore(self, seq_id: int, tokens: Sequence[int], source: PageSource | None = None) -> int:
        """Attach the pages with which ``tokens`` go on after those that ``seq_id`` has, from ``source`` or the tier.

        ``tokens`` begin with the stored ones, which are whole pages. Stops at the first page that neither pool nor
        source has, that comes back damaged, or that finds no frames; idle pages are given up for them. Returns the
        tokens stored then. The frames it takes are those that :meth:`reserve` would take for the same tokens.
        """
        table = self._idle_table(seq_id, "restore")
        before = len(table.tokens)
        start = self._store.full_pages(table)
        source = source or self._cache.tier
        if source is None or self._store.in_open(table):
            return before
        holds = source.holds

        def longest(known: Sequence[int]) -> list[bytes]:
            return self._cache.longest(table.hash, known, start, lambda key: key in self._index or holds(key))

        found = self._reachable(partial(longest, tokens))
        while (attached := self._store.attach(table, found, source)) < len(found):
            # Something was damaged or found no frames; the pages before it may do.
            found = self._reachable(partial(longest, tokens[: before + attached * self.page_tokens + 1]))
        table.tokens.extend(tokens[before : before + len(found) * self.page_tokens])
        self._load_state(seq_id, table, before)
        self._hits += len(table.tokens) - before
        return len(table.tokens)

    def can_open(self) -> bool:
        """Whether one more sequence finds a slot for its states."""
        return self.states is None or self.states.available() > 0

    def lookup(self, tokens: Sequence[int], salt: bytes = b"") -> int:
        """Tokens that :meth:`open` and :meth:`restore` would find now, if no page is damaged."""
        return self._cache.reach(tokens, salt) * self.page_tokens

    def hashes(self, tokens: Sequence[int], salt: bytes = b"") -> list[bytes]:
        """The hashes of the full pages of ``tokens``, all tokens but the last."""
        return list(self._cache.chain(self._cache.root(salt), tokens, 0))

    def fork(self, parent: int, child: int) -> None:
        """Create ``child`` with ``parent``'s tokens. All pages are shared; the open one is copied on the next write.

        Raises ``CacheError`` while ``parent`` has a reservation.
        """
        self._new_id(child)
        source = self._idle_table(parent, "fork")
        if self.states is not None:
            self.states.fork(parent, child)
        table = SequenceTable(source.hash, source.gone[:], source.tokens[:], source.sealed[:])
        self._allocator.retain(table.held())
        if source.open is not None and self._store.in_open(source):
            table.open = source.open
            self._allocator.retain(source.open)
        self._tables[child] = table

    def truncate(self, seq_id: int, length: int) -> None:
        """Forget the tokens from ``length`` on, which must lie in the open page: a sealed page is never un-encoded."""
        table = self._idle_table(seq_id, "truncate")
        if self.states is not None and length != len(table.tokens):
            raise CacheError(f"cannot truncate sequence {seq_id}: the states of recurrent layers do not go back")
        least = len(table.tokens) - self._store.in_open(table)
        if not least <= length <= len(table.tokens):
            raise CacheError(
                f"cannot truncate sequence {seq_id} to {length} tokens: it has {len(table.tokens)}, "
                f"of which the first {least} are in sealed pages"
            )
        del table.tokens[length:]

    def free(self, seq_id: int) -> None:
        """Drop a sequence, reserved or not. Its indexed pages stay cached until their frames are needed."""
        table = self._table(seq_id)
        if table.reservation is not None:
            self.rollback(seq_id)
        self.give_back(seq_id)
        del self._tables[seq_id]
        if self.states is not None:
            self.states.close(seq_id)
        self._index.tick()
        if table.open is not None:
            self._store.release_open(table.open)
        for page, group in reversed([*self.shape.kept_parts(self._store.full_pages(table))]):
            self._cache.release(self._store.part(table, page, group))

    def length(self, seq_id: int) -> int:
        """Tokens stored, without those of a reservation."""
        return len(self._table(seq_id).tokens)

    def tokens(self, seq_id: int) -> list[int]:
        """The tokens stored."""
        return self._table(seq_id).tokens.tolist()

    def stored(self, seq_id: int) -> SequencePages:
        """The pages of the tokens stored now, without a reservation's; ``head`` is empty without an open page."""
        table = self._table(seq_id)
        own = table.open or ()
        return self._pages(len(table.tokens), 0, table.sealed[:], own, own)

    def reserved(self, seq_id: int) -> bool:
        """Whether the sequence has a reservation."""
        return self._table(seq_id).reservation is not None

    def sequences(self) -> list[int]:
        """The ids of all sequences, oldest first."""
        return list(self._tables)

    # One step

    def frames_needed(self, seq_id: int, count: int, tentative: bool = False) -> int:
        """Frames that :meth:`reserve` with the same arguments would take."""
        table = self._table(seq_id)
        crossed = self._store.crossed(table, count)
        pages = self._store.writable(table) is None
        return self._store.sealed_frames(table, crossed) + (pages + (tentative and crossed > 0)) * self.open_frames

    def chunk(self, seq_id: int, count: int) -> int:
        """How many of ``count`` tokens to store at once: states can be found again only where a step ends."""
        if self.states is None or not self.enable_prefix_caching:
            return count
        table = self._table(seq_id)
        if not table.goals:
            return count
        start = len(table.tokens)
        end = (start + count) // self.page_tokens
        end = min([end, *(goal for goal in table.goals if goal * self.page_tokens > start)])
        if end not in table.goals:
            end -= end % self.states.spacing
        inside = end * self.page_tokens - start
        return inside if inside > 0 else count

    def frames_ahead(self, seq_id: int, count: int, at_once: int) -> int:
        """Most frames, beyond those that it has, that the sequence takes while it stores ``count`` more tokens in steps
        of up to ``at_once``."""
        table = self._table(seq_id)
        pages = self._store.writable(table) is None
        steps = (self.page_tokens - 1 + at_once) // self.page_tokens
        sealed = self.shape.ahead(self._store.full_pages(table), self._store.crossed(table, count), steps)
        return sealed + pages * self.open_frames

    def tokens_in(self, frames: int) -> int:
        """Tokens of full pages that one sequence holds in ``frames`` frames."""
        return self.shape.pages_in(frames) * self.page_tokens

    def available(self) -> int:
        """Frames that can be had: free ones, and cached ones without an owner."""
        return self._cache.available()

    def reserve(self, seq_id: int, count: int, tentative: bool = False) -> None:
        """Take the frames for ``count`` more tokens, all or none.

        ``tentative``: fewer tokens than that may be committed. A tentative step may cross one page boundary, and then
        has a second open page, so that the first one's rows outlive the step. Raises ``OutOfPages`` and changes
        nothing when the frames are not there, ``CacheError`` when the sequence already has a reservation.
        """
        assert count > 0, count
        table = self._idle_table(seq_id, "reserve for")
        crossed = self._store.crossed(table, count)
        if tentative and crossed > 1:
            raise CacheError(
                f"sequence {seq_id} has {len(table.tokens)} tokens: {count} tentative ones would cross {crossed} page "
                f"boundaries of {self.page_tokens} tokens; at most 1 is possible"
            )
        needed = self.frames_needed(seq_id, count, tentative)
        if needed > self.available():
            raise OutOfPages(
                f"sequence {seq_id} needs {needed} frames for {count} more tokens; {self.available()} of "
                f"{self.num_frames} are available"
            )
        self._cache.make_free(needed)
        if tentative and self.states is not None:
            self.states.guess(seq_id, count - 1)
        had_open = table.open is not None
        table.open = self._store.own_open(table)
        # Before the sealed frames: no table names these yet, and room for a run may be made by moving any.
        tail = self._store.take_open() if tentative and crossed else None
        table.reservation = Reservation(
            count=count,
            tentative=tentative,
            sealed=self._store.take_sealed(table, crossed),
            tail=tail,
            new_open=not had_open,
        )

    def slice(self, seq_id: int) -> SequencePages:
        """The pages of the current reservation, as the kernels want them."""
        table, step = self._reserved(seq_id)
        assert table.open is not None
        sealed = table.sealed + array("i", step.sealed)
        found = self._pages(len(table.tokens), step.count, sealed, table.open, step.tail or table.open)
        if self.states is None:
            return found
        return replace(found, slot=self.states.slot(seq_id), trail=self.states.trail(seq_id))

    @property
    def moves(self) -> int:
        """How often sealed pages went to other frames: what was sliced before names the old ones."""
        return self._store.moves

    def take_copies(self) -> list[Copy]:
        """Pages to copy, (source frames, target frames), in this order, before the next kernel runs."""
        copies, self._store.copies = self._store.copies, []
        return copies

    def commit(self, seq_id: int, tokens: Sequence[int], defer: bool = False) -> None:
        """Record the reserved tokens as stored; index the pages that they complete.

        A tentative reservation may be committed in part: the rest is given back. ``defer``: what windows leave behind
        stays until :meth:`give_back`, as the step is still to run.
        """
        table, step = self._reserved(seq_id)
        assert len(tokens) == step.count or (step.tentative and len(tokens) < step.count), (len(tokens), step.count)
        pages = self._store.crossed(table, len(tokens))
        completed = self._store.sealed_frames(table, pages)
        table.reservation = None
        if step.tail is not None:
            assert table.open is not None
            keep, drop = (step.tail, table.open) if pages else (table.open, step.tail)
            self._store.release_open(drop)
            table.open = keep
        self._store.put_unused(step.sealed[completed:])
        first = self._store.full_pages(table)
        table.tokens.extend(tokens)
        table.sealed.extend(step.sealed[:completed])
        for number in range(first, first + pages):
            self._store.seal(table, number)
        if pages and not defer:
            self._store.give_back(table, first + pages)
        if self.states is not None:
            if pages and self.enable_prefix_caching and table.goals:
                end, after = first + pages, len(tokens) - self._store.in_open(table)
                stays = end in table.goals or end % self.states.spacing == 0
                self.states.save(seq_id, table.hash, after, step.count, stays)
            self.states.settle(seq_id, step.count - len(tokens))

    def give_back(self, seq_id: int) -> None:
        """Give back what commits have deferred."""
        table = self._table(seq_id)
        self._store.give_back(table, self._store.full_pages(table))

    def rollback(self, seq_id: int) -> None:
        """Drop the reservation of a step that did not run, or that was tentative.

        A step that ran and crossed a page boundary without being tentative may have overwritten the open page: free
        the sequence then.
        """
        table, step = self._reserved(seq_id)
        table.reservation = None
        if self.states is not None:
            self.states.settle(seq_id, 0)
        self._store.put_unused(step.sealed)
        if step.tail is not None:
            self._store.release_open(step.tail)
        if step.new_open and table.open is not None:
            self._store.release_open(table.open)
            table.open = None

    # The whole pool

    def clear_cache(self) -> None:
        """Forget every cached page. Pages that sequences name stay theirs, but nobody finds them any more."""
        self._cache.clear()
        if self.states is not None:
            self.states.clear()

    def stats(self) -> PoolStats:
        """The pool in numbers."""
        free = self._allocator.free
        cached = self._index.idle_frames
        parts = self._allocator.counts
        return PoolStats(
            num_frames=self.num_frames,
            free=free,
            open=parts[-1],
            sealed=self.num_frames - free - parts[-1] - cached,
            shared=self._allocator.shared,
            cached=cached,
            queries=self._queries,
            hits=self._hits,
            evictions=self._cache.evictions,
            groups=tuple(parts[:-1]),
            tier=None if self._cache.tier is None else self._cache.tier.stats(),
            states=None if self.states is None else self.states.stats(),
        )

    def map(self) -> bytes:
        """What each frame is, as :func:`kvbits.pages.map.frame_map` writes it."""
        return frame_map(self._tables.values(), self._allocator, self._index)

    def check(self) -> None:
        """Recount everything from the tables; raise ``AssertionError`` with every term if something does not add up."""
        check_invariants(self._tables.values(), self.shape, self._allocator, self._index, self.stats())
        for seq_id, table in self._tables.items():
            full, sealed = self._store.full_pages(table), self.shape.pages(len(table.sealed))
            assert full == sealed, f"sequence {seq_id} has {len(table.tokens)} tokens and {sealed} sealed pages"
        if self._cache.tier is not None:
            self._cache.tier.check()
        if self.states is not None:
            self.states.check(self._tables)

    # Internals

    def _table(self, seq_id: int) -> SequenceTable:
        table = self._tables.get(seq_id)
        if table is None:
            raise CacheError(f"there is no sequence {seq_id} in the cache; there are {len(self._tables)} others")
        return table

    def _new_id(self, seq_id: int) -> None:
        if seq_id in self._tables:
            raise CacheError(f"sequence {seq_id} is already in the cache, with {self.length(seq_id)} tokens")

    def _idle_table(self, seq_id: int, action: str) -> SequenceTable:
        table = self._table(seq_id)
        if table.reservation is not None:
            raise CacheError(f"cannot {action} sequence {seq_id}: {table.reservation.count} tokens are reserved")
        return table

    def _reserved(self, seq_id: int) -> tuple[SequenceTable, Reservation]:
        table = self._table(seq_id)
        if table.reservation is None:
            raise CacheError(f"sequence {seq_id} has no reservation")
        return table, table.reservation

    def _load_state(self, seq_id: int, table: SequenceTable, before: int) -> None:
        """The state after the pages that ``table`` was given beyond ``before`` tokens."""
        if self.states is not None and len(table.tokens) > before:
            self.states.load(seq_id, table.hash)

    def _reachable(self, find: Callable[[], list[bytes]]) -> list[bytes]:
        """Pages that ``find`` finds; where there are states, those at their end are ready to be loaded."""
        found = find()
        while found and self.states is not None and not self.states.ready(found[-1]):
            found = find()  # what was damaged is found no more
        return found

    def _pages(self, start: int, count: int, sealed: array[int], head: Frames, tail: Frames) -> SequencePages:
        """``sealed``: the frames of all full pages, the first one's included."""
        sink = () if self.sink_frames is None else tuple(sealed[: self.sink_frames])
        return SequencePages(start, count, sealed[len(sink) :], head, tail, sink, len(self.shape.groups))
