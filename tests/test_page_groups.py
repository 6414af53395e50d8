"""The page manager with groups of layers, some of which give pages back, under random operations."""

from __future__ import annotations

import copy
import random

import pytest
from helpers.pages import extend, store, text
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from test_pages import Key, P, PageMachine

from kvbits.errors import OutOfPages
from kvbits.pages import PageGroup, PageManager
from kvbits.pages.allocator import FrameAllocator
from kvbits.pages.groups import GONE, PageShape

GROUPS = st.lists(
    st.builds(
        PageGroup,
        frames=st.just(1),
        first_frames=st.sampled_from([None, None, 2]),
        kept=st.sampled_from([None, 0, 1, 1, 2, 3]),
    ),
    min_size=1,
    max_size=3,
)


class GroupMachine(PageMachine):
    """The cached pages are parts: ``Key`` and the group's number."""

    @initialize(
        frames=st.integers(14, 30),
        open_frames=st.integers(1, 4),
        groups=GROUPS,
        caching=st.sampled_from([True, True, True, False]),
        adjacent=st.booleans(),
    )
    def start(self, frames: int, open_frames: int, groups: list[PageGroup], caching: bool, adjacent: bool) -> None:
        self.groups, self.shape = groups, PageShape(groups)
        self.open_frames, self.sealed_frames, self.caching = open_frames, self.shape.frames, caching
        self.first_frames = self.shape.first_frames
        different = self.first_frames != self.sealed_frames
        self.manager = PageManager(
            frames,
            open_frames,
            page_tokens=P,
            enable_prefix_caching=caching,
            on_evict=self.evicted,
            sink_frames=self.first_frames if different else None,
            groups=groups,
            move=self.move if adjacent else None,
        )
        self.adjacent = adjacent
        self.buffer = [None] * frames
        self.pending, self.live, self.cached, self.freed_at = [], {}, {}, {}
        self.clock = self.next_id = self.generation = 0
        self.evicting = []

    def move(self, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        assert self.adjacent
        moves = dict(zip(source, target, strict=True))
        heads = {f for i in self.live for f in self.manager.stored(i).head}
        assert not heads & {*source, *target}, "an open page is where it is"
        self.moved.append(moves)
        for a, b in moves.items():
            self.buffer[b] = copy.deepcopy(self.buffer[a])
        self.cached = {k: tuple(moves.get(f, f) for f in frames) for k, frames in self.cached.items()}

    def note(self, key: Key, frames: tuple[int, ...]) -> None:
        at = 0
        for number, group in enumerate(self.groups):
            size = group.frames if len(key[2]) > P else group.first
            self.cached.setdefault((*key, number), frames[at : at + size])
            at += size

    def evicted(self, digest: bytes, frame: int) -> None:
        self.evicting.append(frame)
        idle = self.idle()
        (victim,) = [k for k, held in idle.items() if held[: len(self.evicting)] == tuple(self.evicting)]
        if idle[victim] != tuple(self.evicting):
            return
        self.evicting = []
        if self.groups[victim[3]].kept is None:
            longer = [k for k in idle if k[:2] == victim[:2] and k[3] == victim[3] and k[2][:-P] == victim[2]]
            assert not longer, "a page was evicted before the idle one that continues it"
        del self.cached[victim]

    def expected_hit(self, tokens: list[int], salt: bytes) -> int:
        """The longest beginning of which every group has what the next token sees."""

        def there(page: int, group: int) -> bool:
            return (self.generation, salt, tuple(tokens[: (page + 1) * P]), group) in self.cached

        for pages in range((len(tokens) - 1) // P if self.caching else 0, 0, -1):
            seen = [
                (p, g) for g, group in enumerate(self.groups) for p in range(pages) if not self._hidden(p, g, pages)
            ]
            if all(there(page, group) for page, group in seen):
                return pages * P
        return 0

    def _hidden(self, page: int, group: int, pages: int) -> bool:
        kept = self.groups[group].kept
        return kept is not None and page < pages - kept

    def gone(self, page: int, part: int, sealed: int) -> bool:
        for number, group in enumerate(self.groups):
            part -= group.frames if page else group.first
            if part < 0:
                return self._hidden(page, number, sealed)
        raise AssertionError(part)


GroupMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestGroupMachine = GroupMachine.TestCase


def manager(frames: int = 60, open_frames: int = 2, **options: object) -> PageManager:
    """All pages of one group, three of the other."""
    return PageManager(frames, open_frames, groups=[PageGroup(), PageGroup(kept=3)], **options)


def test_a_window_holds_what_it_sees_and_no_more() -> None:
    pages = manager()
    store(pages, 0, text(0, 64 * 10))
    held = pages.stored(0).sealed
    assert [frame >= 0 for frame in held[::2]] == [True] * 10
    assert [frame >= 0 for frame in held[1::2]] == [False] * 7 + [True] * 3
    stats = pages.stats()
    assert (stats.sealed, stats.cached, stats.groups) == (13, 7, (10, 10))
    pages.clear_cache()
    assert (pages.stats().free, pages.stats().groups) == (60 - 13 - 2, (10, 3))


def test_a_hit_needs_only_what_the_next_token_sees() -> None:
    pages = manager()
    tokens = text(0, 64 * 10)
    store(pages, 0, tokens)
    pages.free(0)
    for key in list(pages._cache.chain(pages._cache.root(b""), tokens, 0))[:4]:
        page = pages._index.get(key + b"\x01\x00")
        pages._index.remove(page)
        pages._allocator.put(page.frames)
    assert pages.lookup([*tokens, 1]) == 64 * 10
    # Pages 4 to 6 are the first three in a row.
    assert pages.lookup(tokens[: 64 * 7 + 1]) == 64 * 7
    assert pages.lookup(tokens[: 64 * 7]) == 0
    assert store(pages, 1, [*tokens[: 64 * 7], 5, 6]) == 64 * 7
    pages.check()


def test_the_end_of_a_text_is_found_after_it_was_given_up_in_the_middle() -> None:
    """Where a page of a full group is missing nothing after it is of use."""
    pages = manager()
    tokens = text(1, 64 * 6 + 1)
    store(pages, 0, tokens)
    pages.free(0)
    key = list(pages._cache.chain(pages._cache.root(b""), tokens, 0))[2]
    page = pages._index.get(key)
    pages._index.remove(page)
    pages._allocator.put(page.frames)
    assert pages.lookup(tokens) == 64 * 2


def test_a_fork_keeps_what_its_parent_gives_back() -> None:
    pages = manager(enable_prefix_caching=False)
    store(pages, 0, text(0, 64 * 4 + 5))
    pages.fork(0, 1)
    before = list(pages.stored(1).sealed)
    extend(pages, 0, text(1, 64 * 3))
    assert list(pages.stored(1).sealed) == before
    assert pages.stats().sealed == (4 + 3) + (3 + 3)
    pages.free(1)
    assert pages.stats().sealed == 7 + 3


def test_frames_ahead_are_never_exceeded() -> None:
    """Step by step, against what is really held at the worst moment."""
    for step in (1, 64, 100, 700):
        for length in (1, 63, 200, 1500):
            pages = manager(200, enable_prefix_caching=False)
            pages.open(0, [])
            promised, most = pages.frames_ahead(0, length, step), 0
            for start in range(0, length, step):
                count = min(step, length - start)
                pages.reserve(0, count)
                most = max(most, 200 - pages.available())
                pages.commit(0, [1] * count)
            # Each group's worst moment, which need not be the same.
            assert most <= promised <= most + 1 + step // 64, (step, length)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_runs_are_whole_and_cost_what_they_hold(data: st.DataObject) -> None:
    """Any free frames in the number of a run become one, and every frame stays somebody's."""
    run = data.draw(st.integers(2, 5))
    frames = FrameAllocator(data.draw(st.integers(run, 30)), run)
    singles: list[int] = []
    runs: list[tuple[int, ...]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from("siSrR"))
        if what in "si" and frames.free:
            singles += frames.take(1)
        elif what == "S" and singles:
            frame = singles.pop(data.draw(st.integers(0, len(singles) - 1)))
            frames.release((frame,))
            frames.put((frame,))
        elif what == "r" and frames.free >= run:
            moves = frames.free_run()
            assert set(moves) <= set(singles)
            assert not set(moves.values()) & set(singles)
            singles = [moves.get(frame, frame) for frame in singles]
            taken = frames.take_run()
            assert taken == tuple(range(taken[0], taken[0] + run))
            assert taken[0] % run == 0
            runs.append(taken)
        elif what == "R" and runs:
            taken = runs.pop(data.draw(st.integers(0, len(runs) - 1)))
            frames.release(taken)
            frames.put(taken)
        held = [*singles, *(f for taken in runs for f in taken)]
        assert sorted([*held, *frames.free_frames()]) == list(range(frames.num_frames))
        assert frames.free == frames.num_frames - len(held)
        assert all(frames.refs[f] == (f in held) for f in range(frames.num_frames))


def test_a_move_carries_cached_pages_and_their_content() -> None:
    """An open page needs a run, all runs are broken by pages that somebody may ask for again: they move."""
    moved: dict[int, int] = {}
    pages = manager(18, 3, move=lambda a, b: moved.update(zip(a, b, strict=True)))
    tokens = text(0, 64 * 3 + 1)
    store(pages, 0, tokens)
    store(pages, 1, text(1, 64 * 2 + 1))
    pages.free(0)
    before = {key: page.frames for key, page in pages._index._by_hash.items()}
    pages.open(2, [])
    while not moved:
        pages.reserve(2, 1)
        pages.commit(2, [7])
        pages.check()
        pages.fork(2, 3 + len(pages.sequences()))
        pages.reserve(2, 1)
        pages.commit(2, [7])
        pages.check()
    after = {key: page.frames for key, page in pages._index._by_hash.items()}
    assert after == {k: tuple(moved.get(f, f) for f in frames) for k, frames in before.items() if k in after}


@pytest.mark.parametrize(("frames", "run", "seed"), [(23, 4, 2), (30, 5, 49), (20, 3, 48)])
def test_room_for_a_second_open_page_moves_no_frame_that_was_just_taken(frames: int, run: int, seed: int) -> None:
    """Guesses that cross a page's end in a full and broken pool: seeds in which they need a run that is not there."""
    chance = random.Random(seed)
    manager = PageManager(
        frames,
        run,
        page_tokens=P,
        groups=[PageGroup(), PageGroup(kept=1)],
        move=lambda source, target: None,
        enable_prefix_caching=False,
    )
    for number in range(60):
        for sequence in manager.sequences():
            tentative, count = chance.random() < 0.7, chance.randint(1, P)
            try:
                manager.reserve(sequence, count, tentative)
            except OutOfPages:
                manager.free(sequence)
                continue
            manager.check()
            manager.commit(sequence, [1] * (chance.randint(1, count) if tentative else count))
        if len(manager.sequences()) < 4:
            manager.open(number, [])
    assert manager.moves > 0


def test_what_is_deferred_is_given_back_later_or_with_the_sequence() -> None:
    manager = PageManager(20, 2, page_tokens=P, groups=[PageGroup(), PageGroup(kept=1)], enable_prefix_caching=False)
    for sequence in (0, 1):
        manager.open(sequence, [])
        manager.reserve(sequence, 4 * P)
        manager.commit(sequence, [1] * (4 * P), defer=True)
        assert GONE not in manager.stored(sequence).sealed
    manager.give_back(0)
    assert list(manager.stored(0).sealed).count(GONE) == 3
    manager.free(1)
    manager.check()
    assert manager.available() == 20 - 4 - 1 - 2
