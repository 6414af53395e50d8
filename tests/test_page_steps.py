"""One sequence's steps: reserving, committing, tentative steps, forks, truncation and what is refused."""

from __future__ import annotations

import pytest
from helpers.pages import extend, store, text

from kvbits.errors import CacheError, OutOfPages
from kvbits.pages import PageManager


def test_exact_multiple_of_a_page_keeps_an_empty_open_page() -> None:
    manager = PageManager(10, 4)
    store(manager, 0, text(0, 128))
    stats = manager.stats()
    assert (stats.sealed, stats.open, stats.free) == (2, 4, 4)
    assert manager.frames_needed(0, 63) == 0
    assert manager.frames_needed(0, 64) == 1
    assert manager.frames_needed(0, 200) == 3


def test_slice_names_the_frames_of_every_page_that_fills() -> None:
    manager = PageManager(10, 2)
    store(manager, 0, text(0, 70))
    (first,) = manager.stored(0).sealed
    manager.reserve(0, 130)
    pages = manager.slice(0)
    assert (pages.start, pages.count, pages.sealed[0], len(set(pages.sealed))) == (70, 130, first, 3)
    assert pages.head == pages.tail
    assert not set(pages.head) & set(pages.sealed)
    manager.rollback(0)
    manager.check()
    assert (manager.length(0), list(manager.stored(0).sealed)) == (70, [first])


def test_out_of_pages_changes_nothing_and_names_the_numbers() -> None:
    manager = PageManager(8, 2)
    store(manager, 0, text(8, 64 * 2))
    manager.free(0)
    store(manager, 1, text(9, 70))
    before = manager.stats(), manager.stored(1), manager.lookup(text(8, 129))
    with pytest.raises(OutOfPages, match="needs 6 frames for 380 more tokens; 5 of 8"):
        manager.reserve(1, 380)
    assert (manager.stats(), manager.stored(1), manager.lookup(text(8, 129))) == before
    manager.check()
    manager.reserve(1, 64 * 5)
    assert manager.stats().evictions == 2
    assert manager.stats().free == 0
    manager.check()


def test_rollback_of_the_first_reservation_leaves_nothing() -> None:
    manager = PageManager(20, 3)
    manager.open(0, text(34, 100))
    for tentative in (False, True):
        manager.reserve(0, 100, tentative)
        manager.rollback(0)
        manager.check()
        assert (manager.stats().free, manager.stored(0).head) == (20, ())


def test_fork_copies_the_open_page_once_and_only_when_written() -> None:
    manager = PageManager(20, 3)
    store(manager, 0, text(21, 100))
    manager.fork(0, 1)
    assert manager.stats().shared == 4
    assert manager.take_copies() == []
    before = manager.stored(0)
    assert manager.frames_needed(1, 1) == 3
    manager.reserve(1, 1)
    assert manager.take_copies() == [(before.head, manager.slice(1).head)]
    assert manager.take_copies() == []
    assert manager.stored(0) == before
    assert manager.frames_needed(0, 1) == 0
    manager.commit(1, [1])
    manager.check()
    assert manager.stats().shared == 1


def test_fork_of_a_full_page_shares_no_open_page() -> None:
    manager = PageManager(20, 3)
    store(manager, 0, text(22, 64))
    manager.fork(0, 1)
    assert manager.stored(1).head == ()
    extend(manager, 1, [1])
    manager.reserve(0, 1)
    assert manager.take_copies() == []


@pytest.mark.parametrize("accepted", range(9))
def test_tentative_step_over_a_boundary(accepted: int) -> None:
    manager = PageManager(20, 3)
    tokens = text(23, 60)
    store(manager, 0, tokens)
    head = manager.stored(0).head
    assert manager.frames_needed(0, 8, tentative=True) == 4
    manager.reserve(0, 8, tentative=True)
    pages = manager.slice(0)
    assert pages.head == head
    assert not set(pages.head) & set(pages.tail)
    manager.commit(0, list(range(accepted)))
    manager.check()
    after, stats = manager.stored(0), manager.stats()
    assert manager.tokens(0) == tokens + list(range(accepted))
    assert after.head == (pages.tail if accepted >= 4 else head)
    assert list(after.sealed) == (list(pages.sealed) if accepted >= 4 else [])
    assert (stats.open, stats.sealed) == (3, int(accepted >= 4))
    # Only tokens that were accepted are indexed.
    assert manager.lookup([*tokens, 0, 1, 2, 3, 9]) == (64 if accepted >= 4 else 0)
    assert manager.lookup([*tokens, 0, 1, 2, 9, 9]) == 0


def test_tentative_step_inside_a_page_takes_nothing() -> None:
    manager = PageManager(20, 3)
    store(manager, 0, text(24, 50))
    assert manager.frames_needed(0, 8, tentative=True) == 0
    manager.reserve(0, 8, tentative=True)
    assert manager.slice(0).head == manager.slice(0).tail
    manager.commit(0, [1])
    assert manager.length(0) == 51


def test_tentative_step_over_two_boundaries_is_refused() -> None:
    manager = PageManager(20, 3)
    store(manager, 0, text(25, 60))
    with pytest.raises(CacheError, match="68 tentative ones would cross 2 page boundaries"):
        manager.reserve(0, 68, tentative=True)
    manager.reserve(0, 67, tentative=True)


def test_truncate_reaches_the_open_page_only() -> None:
    manager = PageManager(20, 3)
    tokens = text(26, 100)
    store(manager, 0, tokens)
    with pytest.raises(CacheError, match="to 63 tokens: it has 100, of which the first 64 are in sealed pages"):
        manager.truncate(0, 63)
    with pytest.raises(CacheError, match="to 101 tokens"):
        manager.truncate(0, 101)
    manager.truncate(0, 64)
    assert manager.tokens(0) == tokens[:64]
    extend(manager, 0, text(27, 64))
    assert manager.lookup([*tokens[:64], *text(27, 64), 1]) == 128


def test_misuse_names_the_sequence() -> None:
    manager = PageManager(20, 3)
    store(manager, 5, [1, 2, 3])
    with pytest.raises(CacheError, match="sequence 5 is already in the cache, with 3 tokens"):
        manager.open(5, [])
    with pytest.raises(CacheError, match="already"):
        manager.fork(5, 5)
    for call in (manager.free, manager.length, manager.tokens, manager.stored, manager.slice, manager.rollback):
        with pytest.raises(CacheError, match="no sequence 6"):
            call(6)
    with pytest.raises(CacheError, match="sequence 5 has no reservation"):
        manager.commit(5, [])
    manager.reserve(5, 1)
    for refused in (lambda: manager.reserve(5, 1), lambda: manager.fork(5, 7), lambda: manager.truncate(5, 1)):
        with pytest.raises(CacheError, match="sequence 5: 1 tokens are reserved"):
            refused()
    manager.free(5)
    assert manager.stats().free == 20


def test_check_notices_a_wrong_count() -> None:
    manager = PageManager(20, 1)
    store(manager, 0, text(29, 100))
    manager._allocator.refs[manager.stored(0).sealed[0]] += 1
    with pytest.raises(AssertionError, match="references 2, named by"):
        manager.check()
