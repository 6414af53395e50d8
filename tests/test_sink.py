"""The first page of every sequence in a format of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.attention import PLAIN, assert_agrees, make_inputs, run
from helpers.pages import store, text

from kvbits.codecs import SCHEMES, PoolLayout, parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError
from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.pages import PageManager
from kvbits.planning import plan
from kvbits.pool import PagedPool

GEOMETRY = ModelGeometry("m", (LayerGeometry(9, 3, 64, 64, 0.125),) * 30, 8192, 100)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", ["int4+sink:int8", "int8+sink:bf16", "int8,int3+sink:int6", "int2+sink:int8/int4"])
def test_kernels_agree_with_the_reference(dtype: str, isa: str) -> None:
    assert_agrees(PLAIN, dtype, isa, [1, 63, 64, 65, 129, 200])
    assert_agrees(replace(PLAIN, window=100, num_heads=2), dtype, isa, [330])


@pytest.mark.parametrize("dtype", ["int4+sink:int8", "int8+sink:bf16"])
def test_same_bits_whatever_the_batch_and_the_chunk(dtype: str) -> None:
    inputs = make_inputs(PLAIN, [200, 64, 65, 1, 1300])
    outputs, pages = run(CpuBackend(threads=2), PLAIN, dtype, inputs)
    for chunk, alone in [(7, False), (64, True), (2000, True)]:
        again, pages_again = run(CpuBackend(threads=1), PLAIN, dtype, inputs, chunk, alone=alone)
        assert all(torch.equal(a, b) for a, b in zip([*outputs, *pages], [*again, *pages_again], strict=True))


def test_a_better_first_page_brings_the_answer_nearer() -> None:
    inputs = make_inputs(PLAIN, [128])
    exact, _ = run(CpuBackend(), PLAIN, "bf16", inputs)
    errors = []
    for dtype in ("int2", "int2+sink:int4", "int2+sink:int8", "int2+sink:bf16"):
        got, _ = run(CpuBackend(), PLAIN, dtype, inputs)
        errors.append(float((got[0] - exact[0])[64:].square().mean()))
    # the second page's queries see the first page and their own: nothing but the sink
    assert errors[0] > 4 * errors[1] > 64 * errors[2]
    assert errors[3] < 1e-9


def test_the_string() -> None:
    policy = parse_policy(" INT4+sink:int8 ", 2)
    assert (policy.name, policy.layers, policy.sink) == (
        "int4+sink:int8",
        (SCHEMES["int4"],) * 2,
        (SCHEMES["int8"],) * 2,
    )
    assert parse_policy("0:int8,1:int4+sink:int8/int4", 2).sink is not None
    for wrong, part in [("int4+int8", "not \\+sink:DTYPE"), ("int4+sink:int9", "int9"), ("+sink:int8", "empty")]:
        with pytest.raises(ConfigError, match=part):
            parse_policy(wrong, 2)


def test_accounting() -> None:
    layout = PoolLayout.of(GEOMETRY, parse_policy("int4+sink:int8", 30))
    plain = PoolLayout.of(GEOMETRY, parse_policy("int4", 30))
    assert layout.sink is not None
    assert (layout.frame_bytes, layout.sink.frames, layout.open.frames) == (plain.frame_bytes, 2, plain.open.frames)
    assert layout.frames_of(63) == layout.open.frames
    for tokens in (64, 128, 2048):
        assert layout.frames_of(tokens) == plain.frames_of(tokens) + 1
    for frames in range(40):
        full = layout.full_pages(frames)
        assert full < 0 or layout.frames_of(64 * full) <= frames
        assert layout.frames_of(64 * (full + 1)) > frames
    pool = PagedPool(GEOMETRY, parse_policy("int4+sink:int8", 30), 50 * layout.frame_bytes)
    assert pool.bits_per_element() == 4.5
    assert pool.effective_bits_per_element(2048) == pytest.approx(4.5 * layout.frames_of(2048) / 32)
    (scheme,) = plan(GEOMETRY, [pool.policy], 50 * layout.frame_bytes, [2048]).schemes
    assert scheme.longest_context == 64 * layout.full_pages(50) + 63
    with pytest.raises(ConfigError, match="one session needs"):
        PagedPool(GEOMETRY, pool.policy, (layout.open.frames + 1) * layout.frame_bytes)


def test_manager_keeps_the_first_page_together() -> None:
    manager = PageManager(20, 3, sink_frames=2)
    store(manager, 0, text(0, 70))
    pages = manager.stored(0)
    assert (len(pages.sink), len(pages.sealed), len(pages.head)) == (2, 0, 3)
    assert manager.frames_needed(0, 58) == 1
    assert store(manager, 1, text(0, 70) + text(1, 70)) == 64
    other = manager.stored(1)
    assert (other.sink, len(other.sealed)) == (pages.sink, 1)
    assert manager.stats().shared == 2
    manager.free(0)
    manager.free(1)
    assert (manager.stats().cached, manager.available()) == (3, 20)
    gone: list[int] = []
    manager._store.on_evict = lambda digest, frame: gone.append(frame)
    manager.open(2, text(2, 10))
    manager.reserve(2, 64 * 15)
    assert sorted(gone) == sorted([*other.sink, *other.sealed])
    manager.check()


def test_without_a_full_page_there_is_no_sink() -> None:
    manager = PageManager(20, 3, sink_frames=2)
    store(manager, 0, text(0, 63))
    assert manager.stored(0).sink == ()
    manager.reserve(0, 1, tentative=True)
    assert (len(manager.slice(0).sink), len(manager.slice(0).sealed)) == (2, 0)
    manager.rollback(0)
    manager.check()
