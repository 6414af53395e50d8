"""The second tier: the same bytes come back, or none at all."""

from __future__ import annotations

import errno
import logging
from collections import OrderedDict

import pytest
from helpers.pages import extend, text
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbits.pages import PageManager, SecondTier
from kvbits.pages.allocator import Frames

P = 4
"""Tokens in a page of the random test."""


class FakeMover:
    """Slots and frames are entries of lists. ``broken`` slots fail their checksum; ``full`` refuses to write."""

    def __init__(self, frames: list[object], slots: int) -> None:
        self.frames = frames
        self.slots: list[object] = [None] * slots
        self.broken: set[int] = set()
        self.full = False

    def save(self, frame: int, slot: int) -> bytes:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.slots[slot] = self.frames[frame]
        self.broken.discard(slot)
        return repr(self.slots[slot]).encode()

    def load(self, slot: int, frame: int, checksum: bytes) -> bool:
        self.frames[frame] = "damaged" if slot in self.broken else self.slots[slot]
        return repr(self.frames[frame]).encode() == checksum


class Lru:
    """What the tier should hold: the pages given up last, as many as fit."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.pages: OrderedDict[bytes, int] = OrderedDict()

    def keep(self, key: bytes, size: int, fails: bool) -> None:
        """A page comes whose copy ``fails`` or not: the room that was made for it is lost all the same."""
        if size <= self.slots:
            self.pages[key] = size
            self.pages.move_to_end(key)
        while sum(self.pages.values()) > self.slots:
            self.pages.popitem(last=False)
        if fails:
            self.pages.pop(key, None)


class TierMachine(RuleBasedStateMachine):
    """Requests over few prompts in a small pool, with damage and a full disk: nobody ever sees another page's bytes."""

    @initialize(
        frames=st.integers(6, 14), slots=st.integers(1, 30), sink=st.sampled_from([None, 2]), sealed=st.integers(1, 2)
    )
    def start(self, frames: int, slots: int, sink: int | None, sealed: int) -> None:
        self.pool: list[object] = [None] * frames
        self.mover = FakeMover(self.pool, slots)
        self.tier = SecondTier(slots, self.mover)
        self.model = Lru(slots)
        self.manager = PageManager(
            frames, 1, sealed, page_tokens=P, sink_frames=sink, tier=self.tier, on_evict=self.evicted
        )
        self.first, self.sealed = sink or sealed, sealed
        self.gone: list[bytes] = []
        self.live: dict[int, list[int]] = {}
        self.next_id = self.damaged = 0

    def evicted(self, key: bytes, frame: int) -> None:
        """Called for each frame of a page, before the tier sees it."""
        self.gone.append(key)
        first = self.pool[frame][1] == 0  # type: ignore[index]
        if self.gone.count(key) == (self.first if first else self.sealed):
            if key in self.model.pages:
                self.model.pages.move_to_end(key)
            elif not self.tier.read_only:
                self.model.keep(key, self.gone.count(key), self.mover.full)
            self.gone = []

    def pages(self, seq_id: int) -> list[Frames]:
        stored = self.manager.stored(seq_id)
        held = [*stored.sink, *stored.sealed]
        if not held:
            return []
        rest = range(self.first, len(held), self.sealed)
        return [tuple(held[: self.first]), *(tuple(held[i : i + self.sealed]) for i in rest)]

    def verify(self, seq_id: int) -> None:
        tokens = self.live[seq_id]
        for number, frames in enumerate(self.pages(seq_id)):
            for part, frame in enumerate(frames):
                assert self.pool[frame] == (tuple(tokens[: (number + 1) * P]), number, part), (seq_id, number)

    @rule(pages=st.lists(st.integers(0, 1), min_size=1, max_size=4), rest=st.integers(1, P - 1), stay=st.booleans())
    @precondition(lambda self: len(self.live) < 3)
    def serve(self, pages: list[int], rest: int, stay: bool) -> None:
        tokens = [token for page in pages for token in [page] * P] + [9] * rest
        seq_id, self.next_id = self.next_id, self.next_id + 1
        reach = self.manager.lookup(tokens)
        found = self.manager.open(seq_id, tokens)
        assert found <= reach
        if self.manager.frames_needed(seq_id, len(tokens) - found) > self.manager.available():
            self.manager.free(seq_id)
            return
        before = self.tier.stats()
        got = self.manager.restore(seq_id, tokens)
        after = self.tier.stats()
        # Frames taken for one page may push the next one's copy out of a small tier.
        assert found <= got <= reach
        assert got == reach or after.damaged > before.damaged or after.dropped > before.dropped
        self.live[seq_id] = tokens[:got]
        self.verify(seq_id)
        self.manager.reserve(seq_id, len(tokens) - got)
        full = self.manager.slice(seq_id)
        self.manager.commit(seq_id, tokens[got:])
        self.live[seq_id] = tokens
        for frame in full.head:
            self.pool[frame] = "open"
        for number, frames in list(enumerate(self.pages(seq_id)))[got // P :]:
            for part, frame in enumerate(frames):
                self.pool[frame] = (tuple(tokens[: (number + 1) * P]), number, part)
        if not stay:
            self.free(seq_id)

    def free(self, seq_id: int) -> None:
        self.verify(seq_id)
        self.manager.free(seq_id)
        del self.live[seq_id]

    @rule(data=st.data())
    @precondition(lambda self: self.live)
    def leave(self, data: st.DataObject) -> None:
        self.free(data.draw(st.sampled_from(list(self.live))))

    @rule(slot=st.integers(0, 29))
    def damage(self, slot: int) -> None:
        self.mover.broken.add(slot % len(self.mover.slots))

    @rule()
    def fill_the_disk(self) -> None:
        self.mover.full = True

    @rule()
    def clear(self) -> None:
        self.manager.clear_cache()
        self.model.pages.clear()

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check()
        for seq_id in self.live:
            self.verify(seq_id)
        stats = self.tier.stats()
        assert stats.read_only == (stats.failed_writes > 0)
        if not stats.damaged:
            assert {key for key in self.model.pages if self.tier.holds(key)} == set(self.model.pages)
            assert stats.pages == len(self.model.pages)


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def small(slots: int = 20, frames: int = 4) -> tuple[PageManager, FakeMover, SecondTier]:
    mover = FakeMover(list(range(frames)), slots)
    tier = SecondTier(slots, mover)
    return PageManager(frames, 1, tier=tier), mover, tier


def serve(manager: PageManager, seq_id: int, tokens: list[int]) -> int:
    """A whole request; returns what was found."""
    manager.open(seq_id, tokens)
    found = manager.restore(seq_id, tokens)
    extend(manager, seq_id, tokens[found:])
    manager.free(seq_id)
    manager.check()
    return found


def test_a_text_that_left_the_pool_is_found_again() -> None:
    manager, _, _ = small()
    one, two = text(1, 130), text(2, 190)
    assert serve(manager, 0, one) == 0
    assert serve(manager, 1, two) == 0
    assert manager.lookup(one) == 128
    assert serve(manager, 2, one) == 128
    assert serve(manager, 3, two) == 128
    stats = manager.stats()
    assert stats.hits == 256
    assert stats.tier is not None
    assert stats.tier.restored + stats.evictions >= 4
    manager.clear_cache()
    assert manager.lookup(one) == 0
    assert manager.stats().tier.used == 0  # type: ignore[union-attr]


def test_the_oldest_page_makes_room_the_end_of_a_text_first() -> None:
    manager, _, tier = small(slots=3, frames=4)
    for seed in range(4):
        serve(manager, seed, text(seed, 190))
    stats = tier.stats()
    assert (stats.used, stats.pages) == (3, 3)
    assert stats.dropped == stats.stored - 3
    # Six pages were given up before the last text came: the three newest are a whole text, or its beginning.
    assert manager.lookup(text(2, 190)) == 128
    assert manager.lookup(text(0, 190)) == 0


def test_a_damaged_page_is_dropped_and_computed_again() -> None:
    manager, mover, tier = small()
    tokens = text(1, 190)
    serve(manager, 0, tokens)
    serve(manager, 1, text(2, 190))
    assert manager.lookup(tokens) == 128
    mover.broken.update(range(20))
    # The first page never left the pool.
    assert serve(manager, 2, tokens) == 64
    assert tier.stats().damaged == 1
    assert tier.stats().restored == 0


def test_after_a_failed_write_the_tier_only_reads(caplog: pytest.LogCaptureFixture) -> None:
    manager, mover, tier = small()
    tokens = text(1, 190)
    serve(manager, 0, tokens)
    serve(manager, 1, text(2, 190))
    serve(manager, 2, text(3, 190))
    kept = tier.stats().pages
    mover.full = True
    with caplog.at_level(logging.WARNING):
        for seed in range(4, 7):
            serve(manager, seed, text(seed, 190))
    stats = tier.stats()
    assert (stats.pages, stats.failed_writes, stats.read_only) == (kept, 1, True)
    assert [r.message for r in caplog.records] == [
        "the offload tier only reads from now on: a page could not be written: [Errno 28] No space left on device"
    ]
    assert serve(manager, 9, tokens) == 128
