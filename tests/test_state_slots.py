"""Slots of recurrent layers' states: who owns which, and which snapshots are kept."""

from __future__ import annotations

import pytest

from kvbits.config import PAGE_TOKENS
from kvbits.errors import CacheError, OutOfPages
from kvbits.pages import PageManager, StateSlots


class Slots(StateSlots):
    """With contents: what a sequence's own slot holds is written by hand."""

    def __init__(self, slots: int, longest: int = 8) -> None:
        self.held: dict[int, object] = {}
        super().__init__(slots, longest, lambda a, b: self.held.__setitem__(b, self.held.get(a)))

    def write(self, seq_id: int, value: object) -> None:
        self.held[self.slot(seq_id)] = value

    def read(self, seq_id: int) -> object:
        return self.held.get(self.slot(seq_id))


def stored(manager: PageManager, seq_id: int, tokens: list[int], step: int = 10_000) -> list[int]:
    """Store the rest of ``tokens`` as the scheduler does; where the steps ended."""
    ends = []
    while (start := manager.length(seq_id)) < len(tokens):
        count = manager.chunk(seq_id, min(step, len(tokens) - start))
        manager.reserve(seq_id, count)
        manager.states.write(seq_id, tokens[: start + count])
        manager.commit(seq_id, tokens[start : start + count])
        manager.check()
        ends.append(start + count)
    return ends


def test_a_prompt_is_found_up_to_a_snapshot() -> None:
    slots = Slots(9)
    manager = PageManager(100, 4, states=slots)
    text = list(range(5 * PAGE_TOKENS + 9))
    assert manager.open(0, text) == 0
    assert stored(manager, 0, text) == [320, 329]
    # Five pages are there, but states only after the fifth.
    assert manager.open(1, text[:260]) == 0
    assert manager.lookup(text[:320]) == 0
    assert manager.open(2, text[:321]) == 320
    assert slots.read(2) == text[:320]
    manager.free(0)
    assert slots.read(2) == text[:320]
    manager.clear_cache()
    assert manager.open(3, text) == 0
    manager.check()


def test_a_passing_snapshot_makes_room_for_the_next_of_its_sequence() -> None:
    slots = Slots(9)
    manager = PageManager(200, 4, states=slots)
    assert slots.spacing == 8
    text = list(range(20 * PAGE_TOKENS))
    manager.open(0, text[:100])
    stored(manager, 0, text[:100])
    stored(manager, 0, text, step=1)
    found = [page for page in range(1, 20) if manager.lookup(text[: page * PAGE_TOKENS + 1]) == page * PAGE_TOKENS]
    # The prompt's last full page, every eighth, and the newest, which is the twentieth.
    assert found == [1, 8, 16]
    assert manager.lookup([*text, 0]) == 20 * PAGE_TOKENS
    assert slots.stats().snapshots == 4


def test_long_prompts_stop_for_snapshots_by_the_budget() -> None:
    manager = PageManager(1000, 4, states=Slots(9, longest=100))
    assert manager.states.spacing == 50
    text = list(range(100 * PAGE_TOKENS + 1))
    manager.open(0, text)
    ends = stored(manager, 0, text, step=20 * PAGE_TOKENS)
    assert 50 * PAGE_TOKENS in ends
    assert ends[-2:] == [100 * PAGE_TOKENS, 100 * PAGE_TOKENS + 1]
    plain = PageManager(1000, 4, states=Slots(9), enable_prefix_caching=False)
    plain.open(0, text)
    assert stored(plain, 0, text) == [len(text)], "nothing to find, nothing to stop for"


def test_where_prompts_part_a_snapshot_is_made_for_the_third() -> None:
    manager = PageManager(100, 4, states=Slots(20))
    shared = list(range(2 * PAGE_TOKENS + 5))
    found, ends = [], []
    for seq_id in range(3):
        text = [*shared, *range(1000 * (seq_id + 1), 1000 * (seq_id + 1) + 100)]
        found.append(manager.open(seq_id, text))
        ends.append(stored(manager, seq_id, text))
        manager.free(seq_id)
    assert found == [0, 0, 128]
    assert ends == [[192, 233], [128, 192, 233], [192, 233]]


def test_sequences_take_what_snapshots_hold_and_no_more() -> None:
    slots = Slots(3)
    manager = PageManager(100, 4, states=slots)
    text = list(range(PAGE_TOKENS + 1))
    manager.open(0, text)
    stored(manager, 0, text)
    assert slots.stats().snapshots == 1
    manager.open(1, [1])
    assert manager.can_open()
    manager.open(2, [2])
    assert slots.stats().snapshots == 0
    assert not manager.can_open()
    with pytest.raises(OutOfPages, match="sequence 3 needs a slot"):
        manager.open(3, [3])
    assert sorted(manager.sequences()) == [0, 1, 2]
    manager.check()
    manager.free(1)
    assert manager.can_open()


def test_a_fork_has_the_same_state_in_a_slot_of_its_own() -> None:
    slots = Slots(4)
    manager = PageManager(100, 4, states=slots)
    manager.open(0, [1, 2])
    stored(manager, 0, [1, 2])
    manager.fork(0, 1)
    slots.write(0, "other")
    assert slots.read(1) == [1, 2]
    with pytest.raises(CacheError, match="do not go back"):
        manager.truncate(1, 1)
    manager.check()


@pytest.mark.parametrize("right", [0, 1, 3, 4])
def test_guesses_that_do_not_hold_are_undone(right: int) -> None:
    slots = Slots(9)
    manager = PageManager(100, 4, states=slots)
    manager.open(0, [1])
    stored(manager, 0, [1])
    manager.reserve(0, 5, tentative=True)
    trail = manager.slice(0).trail
    assert len(trail) == 4
    for number, slot in enumerate(trail):
        slots.held[slot] = number
    slots.write(0, 4)
    manager.commit(0, [7] * (1 + right))
    assert slots.read(0) == right
    manager.check()
    manager.reserve(0, 3, tentative=True)
    manager.free(0)
    manager.check()
    assert slots.stats().sequences == 0


def test_who_asks_for_nothing_leaves_nothing() -> None:
    """As teacher forcing does, under a salt that nobody can ask for."""
    manager = PageManager(100, 4, states=Slots(9))
    text = list(range(3 * PAGE_TOKENS))
    manager.open(0, [])
    assert stored(manager, 0, text) == [len(text)]
    assert manager.states.stats().snapshots == 0


def test_check_finds_a_slot_that_nobody_owns() -> None:
    manager = PageManager(100, 4, states=Slots(4))
    manager.open(0, [1])
    manager.states._free.pop()
    with pytest.raises(AssertionError, match="slots free"):
        manager.check()
