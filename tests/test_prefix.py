"""The prefix cache: what is found, what is shared, and what is evicted first."""

from __future__ import annotations

import time

import pytest
from helpers.pages import extend, store, text

from kvbits.errors import OutOfPages
from kvbits.pages import PageManager


@pytest.mark.parametrize(
    ("length", "cached"), [(1, 0), (64, 0), (65, 64), (128, 64), (129, 128), (192, 128), (300, 192)]
)
def test_a_cached_prompt_leaves_one_token_to_compute(length: int, cached: int) -> None:
    manager = PageManager(20, 4)
    tokens = text(1, 300)
    store(manager, 0, tokens[:200])
    assert manager.lookup(tokens[:length]) == cached
    assert manager.open(1, tokens[:length]) == cached
    assert manager.tokens(1) == tokens[:cached]
    assert list(manager.stored(1).sealed) == list(manager.stored(0).sealed[: cached // 64])
    manager.check()


def test_the_recomputed_last_page_of_a_cached_prompt_is_not_indexed_twice() -> None:
    manager = PageManager(20, 1)
    tokens = text(1, 128)
    store(manager, 0, tokens)
    assert store(manager, 1, tokens) == 64
    one, two = manager.stored(0).sealed, manager.stored(1).sealed
    assert one[0] == two[0]
    assert one[1] != two[1]
    manager.free(1)
    manager.check()
    assert manager.stats().cached == 0
    manager.free(0)
    assert manager.stats().cached == 2
    manager.open(2, [*tokens, 5])
    assert manager.stored(2).sealed == one


def test_a_page_of_the_running_step_is_not_found() -> None:
    manager = PageManager(20, 1)
    tokens = text(2, 100)
    manager.open(0, tokens)
    manager.reserve(0, 100)
    assert manager.lookup(tokens) == 0
    manager.commit(0, tokens)
    assert manager.lookup(tokens) == 64


def test_salt_cache_key_and_history_separate() -> None:
    tokens = text(3, 200)
    manager = PageManager(40, 1, cache_key=b"int4")
    store(manager, 0, tokens, salt=b"tenant a")
    assert manager.lookup(tokens, b"tenant a") == 192
    assert manager.lookup(tokens, b"tenant b") == 0
    assert manager.lookup(tokens) == 0
    # The same page after another first page is another page.
    assert manager.lookup(text(4, 64) + tokens[64:], b"tenant a") == 0
    assert manager.lookup(tokens[:64] + text(4, 64) + tokens[128:], b"tenant a") == 64


def test_hashes_depend_on_key_salt_and_tokens_and_on_nothing_else() -> None:
    def hashes(cache_key: bytes, salt: bytes, frames: int) -> list[bytes]:
        seen: list[bytes] = []
        manager = PageManager(frames, 1, cache_key=cache_key, on_evict=lambda digest, frame: seen.append(digest))
        store(manager, 0, text(5, 130), salt)
        manager.free(0)
        store(manager, 1, text(6, 64 * (frames - 1)))
        return seen

    base = hashes(b"k", b"s", 5)
    assert len(set(base)) == 2
    assert hashes(b"k", b"s", 9) == base
    for other in (hashes(b"K", b"s", 5), hashes(b"k", b"S", 5), hashes(b"ks", b"", 5), hashes(b"", b"ks", 5)):
        assert not set(other) & set(base)


def test_without_prefix_caching_nothing_stays() -> None:
    manager = PageManager(20, 1, enable_prefix_caching=False)
    tokens = text(7, 200)
    store(manager, 0, tokens)
    assert manager.lookup(tokens) == 0
    assert store(manager, 1, tokens) == 0
    manager.free(0)
    manager.free(1)
    stats = manager.stats()
    assert (stats.free, stats.queries, stats.hits) == (20, 0, 0)


def test_pages_in_use_are_never_evicted() -> None:
    manager = PageManager(6, 1)
    tokens = text(10, 130)
    store(manager, 0, tokens)
    manager.free(0)
    assert manager.open(1, tokens) == 128
    held = list(manager.stored(1).sealed)
    assert manager.available() == 4
    manager.open(2, text(11, 300))
    with pytest.raises(OutOfPages, match="needs 5 frames for 300 more tokens; 4 of 6"):
        manager.reserve(2, 300)
    manager.reserve(2, 192)
    assert not set(held) & {*manager.slice(2).sealed, *manager.slice(2).head}
    assert manager.stats().evictions == 0
    manager.check()


def evictions(manager: PageManager) -> list[int]:
    """Evict everything, one frame at a time; the frames in order."""
    order: list[int] = []
    manager._store.on_evict = lambda digest, frame: order.append(frame)
    manager.open(99, [])
    while manager.available():
        manager.reserve(99, 64 if manager.stored(99).head else 1)
        manager.commit(99, [0] * manager.slice(99).count)
        manager.check()
    return order


def two_cached_texts(manager: PageManager) -> tuple[list[int], list[list[int]]]:
    """The older text of two, three pages each that nobody uses, and the frames of both."""
    old, new = text(12, 193), text(13, 193)
    store(manager, 0, old)
    store(manager, 1, new)
    pages = [list(manager.stored(i).sealed) for i in (0, 1)]
    manager.free(0)
    manager.free(1)
    return old, pages


def test_the_deepest_page_of_the_oldest_text_goes_first() -> None:
    manager = PageManager(12, 1)
    _, pages = two_cached_texts(manager)
    assert evictions(manager) == pages[0][::-1] + pages[1][::-1]


def test_a_hit_renews_the_pages_that_it_uses_and_only_those() -> None:
    manager = PageManager(12, 1)
    old, pages = two_cached_texts(manager)
    assert manager.open(2, old[:129]) == 128
    manager.free(2)
    assert evictions(manager) == [pages[0][2], *pages[1][::-1], pages[0][1], pages[0][0]]


def test_a_shared_trunk_outlives_its_branches() -> None:
    manager = PageManager(12, 1)
    trunk = text(14, 64)
    store(manager, 0, trunk + text(15, 65))
    store(manager, 1, trunk + text(16, 65))
    (shared, left), (same, right) = (manager.stored(i).sealed for i in (0, 1))
    assert shared == same
    manager.free(1)
    manager.free(0)
    assert evictions(manager) == [right, left, shared]


def test_a_page_whose_parent_was_evicted_is_found_again_with_it() -> None:
    """Two sequences compute the same text at once; only one copy of the first page is indexed, by the first."""
    manager = PageManager(8, 1)
    tokens = text(17, 129)
    manager.open(0, tokens)
    manager.open(1, tokens)
    extend(manager, 0, tokens[:64])
    extend(manager, 1, tokens)
    second = manager.stored(1).sealed[1]
    manager.free(0)
    assert manager.lookup(tokens) == 128
    extend(manager, 1, [0] * 64 * 4)
    manager.open(2, [1])
    manager.reserve(2, 1)
    manager.check()
    assert manager.stats().evictions == 1
    assert manager.lookup(tokens) == 0
    manager.free(1)
    manager.commit(2, [1])
    manager.check()
    manager.open(3, tokens)
    extend(manager, 3, tokens[:64])
    manager.free(3)
    manager.check()
    assert manager.lookup(tokens) == 128
    manager.open(4, tokens)
    assert manager.stored(4).sealed[1] == second


def test_a_page_goes_before_the_older_one_that_it_continues() -> None:
    manager = PageManager(12, 1)
    tokens = text(30, 129)
    manager.open(0, tokens)
    manager.open(1, tokens)
    extend(manager, 0, tokens[:64])
    extend(manager, 1, tokens)
    first, second = manager.stored(0).sealed[0], manager.stored(1).sealed[1]
    manager.free(0)
    manager.free(1)
    assert evictions(manager) == [second, first]


def test_of_equally_old_pages_without_idle_successor_the_deepest_goes_first() -> None:
    """A sequence ends with page 0 shared, a copy of page 1 that is not indexed, and page 2 indexed."""
    manager = PageManager(12, 1)
    tokens = text(31, 193)
    # Page 0 is indexed from 3, page 1 from 4, which has a page 0 of its own and keeps running.
    manager.open(3, tokens)
    manager.open(4, tokens)
    extend(manager, 3, tokens[:64])
    manager.open(6, tokens[:65])
    extend(manager, 4, tokens[:128])
    manager.free(3)
    extend(manager, 6, tokens[64:])
    first, _, third = manager.stored(6).sealed
    assert first != manager.stored(4).sealed[0]
    manager.free(6)
    manager.check()
    order: list[int] = []
    manager._store.on_evict = lambda digest, frame: order.append(frame)
    manager.open(7, [])
    while manager.available():
        manager.reserve(7, 64 if manager.stored(7).head else 1)
        manager.commit(7, [0] * manager.slice(7).count)
    assert order == [third, first]


def test_many_hits_without_eviction_keep_the_queue_short_and_in_order() -> None:
    manager = PageManager(12, 1)
    old, new, unused = (text(seed, 129) for seed in (32, 33, 35))
    for seq_id, tokens in enumerate((old, new, unused)):
        store(manager, seq_id, tokens)
    pages = [list(manager.stored(i).sealed) for i in (0, 1, 2)]
    for seq_id in (0, 1, 2):
        manager.free(seq_id)
    for turn in range(500):
        manager.open(2, new if turn % 3 else old)
        manager.free(2)
    assert len(manager._index._heap) < 100
    manager.open(2, old)
    manager.free(2)
    assert evictions(manager) == pages[2][::-1] + pages[1][::-1] + pages[0][::-1]


def test_clear_cache_forgets_also_what_sequences_still_hold() -> None:
    manager = PageManager(12, 1)
    tokens = text(18, 200)
    store(manager, 0, tokens)
    store(manager, 1, text(19, 70))
    manager.free(1)
    manager.clear_cache()
    manager.check()
    assert manager.lookup(tokens) == 0
    assert manager.stats().free == 12 - 4
    extend(manager, 0, text(20, 64))
    assert manager.lookup(manager.tokens(0)) == 0
    manager.free(0)
    manager.check()


def test_statistics_of_hits() -> None:
    manager = PageManager(20, 1)
    tokens = text(28, 100)
    store(manager, 0, tokens)
    store(manager, 1, tokens)
    stats = manager.stats()
    assert (stats.queries, stats.hits, stats.shared) == (200, 64, 1)


def test_a_large_pool_stays_quick() -> None:
    """100,000 frames, all of them cached, then evicted: work per page must not grow with the pool."""
    manager = PageManager(100_000, 1)
    begin = time.process_time()
    for seq_id in range(200):
        store_fast(manager, seq_id, list(range(seq_id, seq_id + 500 * 64)))
        manager.free(seq_id)
    filled = time.process_time() - begin
    begin = time.process_time()
    for seq_id in range(200, 300):
        store_fast(manager, seq_id, list(range(seq_id, seq_id + 500 * 64)))
        manager.free(seq_id)
    evicted = time.process_time() - begin
    manager.check()
    assert manager.stats().evictions > 49_000
    # Half as many sequences, each page now with an eviction. A walk over the pool per page would cost 1000 times more.
    assert evicted < 10 * filled


def store_fast(manager: PageManager, seq_id: int, tokens: list[int]) -> None:
    manager.open(seq_id, tokens)
    manager.reserve(seq_id, len(tokens))
    manager.commit(seq_id, tokens)
