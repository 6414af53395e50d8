"""The second tier's real stores, memory and files, on a tiny model: the same answers, and damage that is noticed."""

from __future__ import annotations

import gc
import random
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from helpers.serving import byte_model, engine_of, greedy
from prometheus_client import CollectorRegistry, generate_latest

from kvbits import LLM, SamplingParams
from kvbits.engine.config import EngineConfig
from kvbits.engine.engine import Engine
from kvbits.engine.offload import MAGIC, FileStore
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel
from kvbits.models.load import wrap
from kvbits.models.packed import pack_linears
from kvbits.server.metrics import EngineCollector
from kvbits.server.observe import Observer
from kvbits.server.worker import EngineWorker


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
        "kvbits:offload_states": 0,
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
