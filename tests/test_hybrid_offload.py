"""States in the second tier: a snapshot leaves with its page and comes back, or nothing is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hybrids import PROMPTS, answers, expected, hybrid_engine, prompt
from helpers.tiny_engine import one_thread

from kvbits.codecs.states import StateLayout
from kvbits.engine.engine import Engine
from kvbits.errors import ConfigError

__all__ = ["one_thread"]

SOME = ("qwen3_next", "lfm2", "bamba")
"""One of each kind of recurrent layer."""


def small(family: str, **options: object) -> Engine:
    """An engine for one sequence of 4 pages, with room for snapshots of no other."""
    roomy = hybrid_engine(family).pool
    frames, slot = 6 * roomy.layout.frame_bytes, roomy.states.slot_bytes
    layout = StateLayout.of(roomy.geometry, 4)
    slots = next(n for n in range(99, 0, -1) if layout.slots(frames + n * slot, 1) == n)
    return hybrid_engine(
        family, max_num_seqs=1, kv_cache_memory=frames + slots * slot, kv_offload_size=1 << 20, **options
    )


def other_texts(engine: Engine) -> None:
    """What pushes every page and every snapshot out."""
    for number in range(engine.pool.states.num_slots + engine.pool.num_frames):
        answers(engine, [prompt(66, 50 + number)], max_tokens=1)


@pytest.mark.parametrize(("family", "where"), [*((family, "memory") for family in SOME), ("lfm2", "file")])
def test_a_prompt_goes_on_from_the_tier(family: str, where: str, tmp_path: Path) -> None:
    engine = small(family, **({"kv_offload_path": str(tmp_path)} if where == "file" else {}))
    right = expected(family)[2][:8]
    assert answers(engine, [PROMPTS[2]], max_tokens=8) == [right]
    other_texts(engine)
    tier = engine.pages.stats().tier
    assert tier.states > 0
    assert tier.used == tier.pages + tier.states * -(-engine.pool.states.slot_bytes // engine.pool.layout.frame_bytes)
    before = engine.stats.cached_tokens
    assert engine.pages.lookup(PROMPTS[2]) == 128
    assert answers(engine, [PROMPTS[2]], max_tokens=8) == [right]
    assert engine.stats.cached_tokens - before == 128
    assert engine.pages.stats().tier.restored == 3, "two pages and the states at the end of the second"
    assert engine.pages.stats().tier.damaged == 0


@pytest.mark.parametrize("family", ["lfm2", "bamba"])
def test_states_that_are_damaged_are_computed_again(family: str) -> None:
    engine = small(family)
    right = expected(family)[2][:8]
    answers(engine, [PROMPTS[2]], max_tokens=8)
    other_texts(engine)
    kept = engine.pages._cache.tier._kept
    for key, page in kept.items():
        if key.startswith(b"state"):
            engine.pages._cache.tier._mover._store.write(page.slots[-1] * engine.pool.layout.frame_bytes, b"damaged")
    before = engine.stats.cached_tokens
    assert answers(engine, [PROMPTS[2]], max_tokens=8) == [right]
    assert engine.stats.cached_tokens == before
    assert engine.pages.stats().tier.damaged == 1
    assert answers(engine, [PROMPTS[2]], max_tokens=8) == [right]
    assert engine.stats.cached_tokens - before == 128, "found again, once computed"


def test_pages_in_the_pool_go_on_from_states_in_the_tier() -> None:
    """A snapshot may leave before its page does."""
    engine = hybrid_engine("lfm2", max_num_seqs=1, kv_offload_size=1 << 20)
    right = expected("lfm2")[2][:8]
    answers(engine, [PROMPTS[2]], max_tokens=8)
    slots = engine.pages.states
    slots.open(999)
    while slots.stats().snapshots:
        slots.guess(1000 + slots.stats().snapshots, slots.available())
    for seq_id in list(slots._trails):
        slots.settle(seq_id, 0)
    slots.close(999)
    assert (slots.stats().snapshots, engine.pages.stats().tier.pages) == (0, 0)
    assert answers(engine, [PROMPTS[2]], max_tokens=8) == [right]
    assert engine.stats.cached_tokens == 128


def test_a_tier_without_room_for_states_is_refused() -> None:
    engine = hybrid_engine("bamba")
    with pytest.raises(ConfigError, match="one page and a sequence's states need"):
        hybrid_engine("bamba", kv_offload_size=engine.pool.layout.frame_bytes)
