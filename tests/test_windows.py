"""Sliding windows in the engine: pages behind them are given back, and every answer is the one without that."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from helpers.asks import Keeping
from helpers.serving import engine_of, packed_byte_model
from torch import Tensor

from kvbits import SamplingParams
from kvbits.codecs import PoolLayout, parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.engine.engine import Engine
from kvbits.engine.model_runner import ModelRunner
from kvbits.engine.outputs import Delta
from kvbits.engine.speculation import SpeculativeConfig
from kvbits.engine.transfer import PageBundle, export_pages, import_pages
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models import LoadedModel
from kvbits.pages import PageGroup, PageManager
from kvbits.planning.window import windowed_session_bytes

GEMMA = ModelGeometry(
    "gemma-3-270m",
    tuple(LayerGeometry(4, 1, 256, 256, 1 / 16, window=None if i % 6 == 5 else 512) for i in range(18)),
    32768,
    262144,
)
"""The shape of Gemma 3 270M."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model(family: str = "qwen3-window", fused: bool = True) -> LoadedModel:
    return packed_byte_model(family=family, fused=fused)


class Poisoned(ModelRunner):
    """Before every step, whatever no sequence names holds numbers that are none."""

    def run(self, batch: object) -> Tensor:
        pages, named = self._pages, set()
        for sequence in pages.sequences():
            step = pages.slice(sequence) if pages.reserved(sequence) else pages.stored(sequence)
            named |= {*step.sealed, *step.sink, *step.head, *step.tail}
        kept = {f for page in pages._index.pages() for f in page.frames}
        named |= {source for copy in pages._store.copies for source in copy[0]}
        left = [frame for frame in range(pages.num_frames) if frame not in named | kept]
        self._pool.buffer[left] = 0xFF
        return super().run(batch)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def params(tokens: int = 150, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1, **options)


def run(engine: Engine, prompts: list[list[int]], wanted: SamplingParams | None = None) -> list[tuple[list, list]]:
    """Tokens and log-probabilities, with the pages checked at every step."""
    for number, tokens in enumerate(prompts):
        engine.add_request(tokens, wanted or params(), request_id=f"{number}")
    found: dict[tuple[str, int], list[Delta]] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            assert delta.error is None, delta
            found.setdefault((delta.request_id, delta.index), []).append(delta)
        engine.pages.check()
    return [
        ([t for d in found[k] for t in d.token_ids], [x for d in found[k] for x in d.logprobs]) for k in sorted(found)
    ]


PROMPTS = [prompt(n, n) for n in (430, 64, 193)]


@cache
def expected(family: str, dtype: str) -> list[tuple[list, list]]:
    config = engine_of(model(family), kv_cache_dtype=dtype, enable_prefix_caching=False).config
    engine = Engine(model(family), config, Keeping())
    assert [group.kept for group in engine.pool.layout.groups] == [None]
    return run(engine, PROMPTS)


@pytest.mark.parametrize("chunk", [7, 64, 100, 700])
@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen3-window", "int4"), ("qwen3-window", "int8+sink:bf16"), ("mistral", "int8")]
)
def test_answers_are_those_with_every_page_kept(family: str, dtype: str, chunk: int) -> None:
    """And what was given back is never read: it holds no numbers."""
    options = {"kv_cache_dtype": dtype, "max_num_batched_tokens": chunk, "enable_prefix_caching": False}
    engine = Engine(model(family), engine_of(model(family), **options).config, runner=Poisoned)
    assert engine.pages.shape.frees
    assert run(engine, PROMPTS) == expected(family, dtype)


def test_the_reference_reads_the_same_pages() -> None:
    config = engine_of(model(fused=False), kv_cache_dtype="int8", enable_prefix_caching=False).config
    engine = Engine(model(fused=False), config, ReferenceBackend(), runner=Poisoned)
    got = run(engine, [PROMPTS[2]], params(3))
    right = run(Engine(model(fused=False), config, Keeping()), [PROMPTS[2]], params(3))
    assert got[0][0] == right[0][0]


def test_preempted_sequences_go_on_where_they_were() -> None:
    size = engine_of(model(), kv_cache_dtype="int8").pool.layout.frame_bytes
    engine = engine_of(model(), kv_cache_dtype="int8", kv_cache_memory=40 * size, max_num_batched_tokens=100)
    assert run(engine, PROMPTS) == expected("qwen3-window", "int8")
    assert engine.stats.preemptions > 0
    assert engine.pages._allocator.run > 1


def test_guesses_forks_and_a_second_turn() -> None:
    engine = engine_of(model(), kv_cache_dtype="int8")
    config = SpeculativeConfig(method="ngram", num_speculative_tokens=6, prompt_lookup_min=1, adaptive=False)
    guessing = Engine(model(), engine.config, speculative=config)
    right = expected("qwen3-window", "int8")
    assert run(guessing, PROMPTS) == right
    assert guessing.stats.speculation.accepted_tokens > 0
    assert run(engine, PROMPTS[:1], params(n=3)) == right[:1] * 3
    turn = [*PROMPTS[0], *right[0][0], 5, 6, 7]
    again = run(engine, [turn], params(20))
    assert engine.stats.cached_tokens >= len(turn) - 67
    assert again == run(engine_of(model(), kv_cache_dtype="int8", enable_prefix_caching=False), [turn], params(20))


def test_pages_move_and_come_back_from_the_second_tier() -> None:
    right = expected("qwen3-window", "int8")
    engine = engine_of(model(), kv_cache_dtype="int8")
    run(engine, PROMPTS[:1], params(1))
    bundle = PageBundle.from_bytes(export_pages(engine, PROMPTS[0]).to_bytes())
    groups = engine.pool.layout.groups
    assert bundle.num_tokens == 384
    assert len(bundle.frames) == sum(group.pages(6) for group in groups) < 6 * len(groups)
    other = engine_of(model(), kv_cache_dtype="int8")
    assert import_pages(other, bundle) == 384
    assert run(other, PROMPTS[:1]) == right[:1]
    assert other.stats.cached_tokens == 384
    size = engine.pool.layout.frame_bytes
    small = engine_of(
        model(), kv_cache_dtype="int8", kv_cache_memory=36 * size, kv_offload_size=200 * size, max_num_batched_tokens=64
    )
    for _ in range(2):
        for tokens, answer in zip(PROMPTS, right, strict=True):
            assert run(small, [tokens]) == [answer]
    assert small.pages.stats().tier.restored > 0


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "int3", "0-2:int8,3-17:int4"])
def test_memory_of_the_shape_of_gemma(dtype: str) -> None:
    """Against the bytes that any engine must hold, and with the page manager holding them."""
    tokens, memory, policy = 8192, 256 << 20, parse_policy(dtype, 18)
    layout, kept = PoolLayout.of(GEMMA, policy), PoolLayout.of(GEMMA, policy, free_windows=False)
    assert layout.session_bytes(tokens) <= 1.05 * windowed_session_bytes(GEMMA, policy, tokens)
    assert kept.session_bytes(tokens) >= 3.5 * layout.session_bytes(tokens)
    sessions, frames = layout.sessions(memory, tokens), layout.frames_in(memory)
    groups = [PageGroup(1, group.first_frames, group.kept) for group in layout.groups]
    moves: list[int] = []
    pages = PageManager(
        frames, layout.open.frames, groups=groups, move=lambda a, b: moves.extend(a), enable_prefix_caching=False
    )
    for sequence in range(sessions):
        pages.open(sequence, [])
        for _ in range(0, tokens, 512):
            pages.reserve(sequence, 512)
            pages.commit(sequence, [1] * 512)
        pages.reserve(sequence, 1)
        pages.commit(sequence, [1])
    pages.check()
    stats = pages.stats()
    assert stats.open + stats.sealed == sessions * layout.frames_of(tokens)
    assert stats.free < layout.frames_of(tokens) + layout.window_groups


@pytest.mark.parametrize("window", [2, 64, 65, 100, 512])
def test_frames_of_a_session_are_the_pages_that_are_seen(window: int) -> None:
    layers = (LayerGeometry(2, 1, 64, 64, 1.0), *(LayerGeometry(2, 1, 64, 64, 1.0, window) for _ in range(3)))
    layout = PoolLayout.of(ModelGeometry("four", layers, 4096, 100), parse_policy("int8", 4))
    for pages in (0, 1, 2, 3, 9, 40):
        seen = sum((p + 1) * PAGE_TOKENS > pages * PAGE_TOKENS - window + 1 for p in range(pages))
        windows = sum(g.kept is not None for g in layout.groups)
        assert layout.frames_of(pages * PAGE_TOKENS + 5) == layout.open.frames + (1 * pages) + windows * seen


def test_a_model_of_windows_alone_is_bounded_by_its_context_only() -> None:
    layers = (LayerGeometry(2, 1, 64, 64, 1.0, 200),) * 3
    layout = PoolLayout.of(ModelGeometry("mistral", layers, 1 << 20, 100), parse_policy("int8", 3))
    assert len(layout.groups) == 1
    assert (
        layout.frame_bytes
        == PoolLayout.of(ModelGeometry("", layers, 1 << 20, 1), parse_policy("int8", 3), False).frame_bytes
    )
    assert layout.frames_of(1 << 20) == layout.open.frames + 4
    assert layout.longest_context(layout.bytes_of(layout.open.frames + 5)) >= 1 << 20
    assert layout.longest_context(layout.bytes_of(layout.open.frames + 4)) == 4 * PAGE_TOKENS + 63
