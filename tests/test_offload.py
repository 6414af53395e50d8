"""The second tier: the same bytes come back, or none at all."""

from __future__ import annotations

import errno
import gc
import logging
import random
import re
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from helpers.pages import extend, text
from helpers.serving import byte_model, engine_of, greedy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry, generate_latest

from kvbits import LLM, SamplingParams
from kvbits.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.offload import MAGIC, FileStore
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel
from kvbits.models.load import wrap
from kvbits.models.packed import pack_linears
from kvbits.pages import PageManager, SecondTier
from kvbits.pages.allocator import Frames
from kvbits.server.metrics import EngineCollector
from kvbits.server.observe import Observer
from kvbits.server.worker import EngineWorker

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


# The real stores, on a tiny model


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes: what a full disk does to a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run(engine: Engine, prompt: list[int], tokens: int = 6) -> tuple[list[int], int]:
    return greedy(engine, prompt, tokens)


def prompts(count: int, length: int = 500) -> list[list[int]]:
    return [random.Random(seed).choices(range(3, 259), k=length) for seed in range(count)]


def packed_model() -> LoadedModel:
    """A model whose rounding does not depend on the other rows of a step."""
    loaded = byte_model()
    loaded = wrap(loaded.model.to(torch.bfloat16), loaded.tokenizer, "tiny")
    pack_linears(loaded.model)
    return loaded


def little_engine(frames: int = 14, loaded: LoadedModel | None = None, **changes: object) -> Engine:
    loaded = loaded or byte_model()
    probe = engine_of(loaded, kv_cache_dtype="int4")
    return engine_of(loaded, kv_cache_dtype="int4", kv_cache_memory=frames * probe.pool.layout.frame_bytes, **changes)


@pytest.mark.parametrize("where", ["memory", "file", "directory"])
def test_answers_from_offloaded_pages_are_those_of_pages_that_stayed(where: str, tmp_path: Path) -> None:
    path = {"memory": None, "file": str(tmp_path / "pages"), "directory": str(tmp_path)}[where]
    engine = little_engine(kv_offload_size=1 << 20, kv_offload_path=path)
    roomy = little_engine(frames=200)
    for _ in range(2):
        expected = [run(roomy, prompt) for prompt in prompts(4)]
        assert [run(engine, prompt) for prompt in prompts(4)] == expected
    stats = engine.pages.stats().tier
    assert stats is not None
    assert stats.restored >= 14
    assert (stats.damaged, stats.failed_writes) == (0, 0)
    assert [p.name for p in tmp_path.iterdir()] == (["pages"] if where == "file" else [])
    del engine
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_noticed_and_the_answer_stays(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    engine = little_engine(kv_offload_size=1 << 20, kv_offload_path=str(path))
    expected = [run(engine, prompt)[0] for prompt in prompts(4)]
    with path.open("r+b") as file:
        for place in range(4096, path.stat().st_size, 997):
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0x10]))
    assert [run(engine, prompt)[0] for prompt in prompts(4)] == expected
    stats = engine.pages.stats().tier
    assert stats is not None
    assert stats.damaged >= 3
    assert not stats.read_only


def test_a_file_that_was_cut_off_is_damage_too(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    engine = little_engine(kv_offload_size=1 << 20, kv_offload_path=str(path))
    expected = [run(engine, prompt)[0] for prompt in prompts(4)]
    with path.open("r+b") as file:
        file.truncate(5000)
    assert [run(engine, prompt)[0] for prompt in prompts(4)] == expected
    assert engine.pages.stats().tier.damaged >= 3  # type: ignore[union-attr]


def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    engine = little_engine(kv_offload_size=1 << 20, kv_offload_path=str(tmp_path))
    roomy = little_engine(frames=200)
    size = engine.pool.layout.frame_bytes
    with file_limit(4096 + 10 * size + 100):
        first = [run(engine, prompt)[0] for prompt in prompts(6)]
        again = [run(engine, prompt)[0] for prompt in prompts(6)]
    assert first == again == [run(roomy, prompt)[0] for prompt in prompts(6)]
    stats = engine.pages.stats().tier
    assert stats is not None
    assert (stats.pages, stats.failed_writes, stats.read_only) == (10, 1, True)
    assert stats.restored > 0


def test_a_preempted_request_comes_back_from_the_tier() -> None:
    loaded = packed_model()
    if loaded.depends_on_rows():
        pytest.skip(str(loaded.depends_on_rows()))
    engine = little_engine(28, loaded, kv_offload_size=1 << 20)
    alone = little_engine(200, loaded)
    expected = {f"r{i}": run(alone, prompt, 200)[0] for i, prompt in enumerate(prompts(4, 300))}
    for i, prompt in enumerate(prompts(4, 300)):
        params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
        engine.add_request(prompt, params, request_id=f"r{i}")
    got: dict[str, list[int]] = {name: [] for name in expected}
    while engine.has_unfinished():
        for delta in engine.step():
            got[delta.request_id] += delta.token_ids
    assert engine.stats.preemptions > 0
    assert engine.pages.stats().tier.restored > 0  # type: ignore[union-attr]
    assert got == expected
    engine.pages.check()


def test_what_an_operator_sees() -> None:
    engine = little_engine(kv_offload_size=1 << 20)
    for prompt in prompts(3):
        run(engine, prompt)
    registry = CollectorRegistry()
    registry.register(EngineCollector(EngineWorker(engine, Observer(registry, "m")), "m"))
    page = generate_latest(registry).decode()
    found = dict(re.findall(r'^(kvbits:offload_\w+)\{model_name="m"\} ([0-9.e+]+)$', page, re.MULTILINE))
    stats = engine.pages.stats().tier
    assert stats is not None
    assert stats.stored > 0
    assert {name: float(value) for name, value in found.items()} == {
        "kvbits:offload_bytes": stats.used * engine.pool.layout.frame_bytes,
        "kvbits:offload_capacity_bytes": stats.slots * engine.pool.layout.frame_bytes,
        "kvbits:offload_pages": stats.pages,
        "kvbits:offload_read_only": 0,
        "kvbits:offload_stored_total": stats.stored,
        "kvbits:offload_restored_total": stats.restored,
        "kvbits:offload_dropped_total": stats.dropped,
        "kvbits:offload_damaged_total": 0,
        "kvbits:offload_failed_writes_total": 0,
    }


# Options


def test_options_that_contradict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_offload_path is 'x'; it also needs kv_offload_size"):
        EngineConfig(kv_offload_path="x")
    with pytest.raises(ConfigError, match="enable_prefix_caching turns off"):
        EngineConfig(kv_offload_size=1, enable_prefix_caching=False)
    with pytest.raises(ConfigError, match="kv_offload_size is 100 bytes; one page needs"):
        engine_of(byte_model(), kv_offload_size=100)
    with pytest.raises(ConfigError, match="cannot offload to '/nowhere/x': No such file"):
        engine_of(byte_model(), kv_offload_size=1 << 20, kv_offload_path="/nowhere/x")


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not an offload file"):
        FileStore(path)
    assert path.read_text() == "years of work"


def test_a_file_left_by_a_killed_process_is_used_again_but_not_a_running_ones(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(MAGIC + b"old")
    store = FileStore(path)
    assert path.read_bytes() == MAGIC
    with pytest.raises(ConfigError, match="another process uses it"):
        FileStore(path)
    del store
    assert not path.exists()


def test_the_real_model_answers_alike_from_offloaded_and_from_computed_pages() -> None:
    texts = [topics[name][:700] for name in sorted(topics, key=lambda name: -len(topics[name]))[:2]]
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=2)
    base = LLM("smollm2-135m", kv_cache_dtype="int4", batch_invariant=True, progress=False)
    frames = base.engine.pool.layout.frames_of(max(len(base.tokenizer(t)["input_ids"]) for t in texts) + 8)
    llm = LLM(
        base.loaded,
        kv_cache_dtype="int4",
        kv_cache_memory=frames * base.engine.pool.layout.frame_bytes,
        kv_offload_size="256MiB",
        batch_invariant=True,
        progress=False,
    )
    computed = [llm.generate(t, params)[0] for t in texts]
    assert llm.engine.pages.stats().tier.restored == 0  # type: ignore[union-attr]
    restored = [llm.generate(t, params)[0] for t in texts]
    assert llm.engine.pages.stats().tier.restored >= 4  # type: ignore[union-attr]
    for before, after in zip(computed, restored, strict=True):
        assert before.num_cached_tokens == 0
        assert after.num_cached_tokens >= len(after.prompt_token_ids) - 64
        assert before.outputs[0].token_ids == after.outputs[0].token_ids
        assert before.outputs[0].logprobs == after.outputs[0].logprobs
