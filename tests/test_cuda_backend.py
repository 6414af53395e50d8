"""What surrounds the CUDA kernels: the flat list of work, which layers have kernels, what is refused and shown."""

from __future__ import annotations

import heapq
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from kvbits.codecs import SCHEMES, parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels import BatchLayout, SequencePages, choose_backend, kernels_line
from kvbits.kernels.base import Ints
from kvbits.kernels.cuda import nvrtc
from kvbits.kernels.cuda.attend import Step
from kvbits.kernels.cuda.variant import DIMS, INT2, INT4, INT8, NF4, RAW, Variant, variant_of
from kvbits.kernels.cuda.work import BEGINNING, OWN, WAVES, Work, WorkList, size_of_an_item, work_list
from kvbits.kernels.reference import ReferenceBackend
from kvbits.kernels.static import refill, static_layout
from kvbits.pool import PagedPool

LAYER = LayerGeometry(32, 8, 128, 128, 128**-0.5)


class Recorded:
    """Launches that do not run; which kernels were made ready."""

    def __init__(self) -> None:
        self.prepared: list[Variant] = []

    def __call__(self, variant: Variant, grid: tuple[int, int], step: Step) -> None:
        raise AssertionError("nothing runs here")

    def prepare(self, variant: Variant) -> None:
        self.prepared.append(variant)


def batch_of(*sequences: tuple[int, int]) -> BatchLayout:
    """Of sequences with a start and a number of new tokens."""
    return BatchLayout.of([SequencePages(s, n, range((s + n) // 64), [900], [900]) for s, n in sequences])


def pages_by_tile(work: Work, together: bool) -> list[list[int]]:
    """The sealed pages that the items of each tile attend to, in the order of their slots; every slot is used once."""
    found: list[list[int]] = []
    items = np.concatenate([work.items, work.first_pages])
    for index, tile in enumerate(work.tiles):
        mine = items[items[:, 0] == index]
        assert len(mine) == tile[6]
        own = mine[mine[:, 3] < 0]
        assert len(own) == 1
        spans = sorted((slot, low, ~high if high < 0 else high) for _, slot, low, high in mine.tolist())
        spans = [span for span in spans if span[1] < span[2]]
        slots = {slot for slot, _, _ in spans} | {0}  # the own page's
        assert sorted(slots) == list(range(tile[5]))
        assert len(slots) == len(spans) + (not (together and own[0, 2] < ~own[0, 3]))
        found.append([page for _, low, high in spans for page in range(low, high)])
    begin, end = work.tiles[:, 4], work.tiles[:, 4] + work.tiles[:, 5]
    assert begin.tolist() == [0, *end[:-1].tolist()]
    assert end[-1] == work.slots
    return found


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("window", [None, 1, 100, 640])
@pytest.mark.parametrize("blocks", [1, 8, 396])
def test_every_page_is_attended_to_once(blocks: int, window: int | None, apart: bool, together: bool) -> None:
    sequences = [(0, 1), (63, 1), (64, 4), (1000, 3), (5, 200), (20_000, 1), (638, 4)]
    work = work_list(batch_of(*sequences), 4, 8, window, apart, together, blocks)
    tiles = [(0, 0, 1), (1, 63, 1), (2, 64, 4), (3, 1000, 3), (5, 20_000, 1), (6, 638, 2), (6, 640, 2)]
    assert [(t[0], t[3], t[2]) for t in work.tiles.tolist()] == tiles  # 200 new tokens are no decode step
    for pages, (_, position, _) in zip(pages_by_tile(work, together), tiles, strict=True):
        low = 0 if window is None else max(position - window + 1, 0) // 64
        assert sorted(pages) == list(range(low, position // 64))
    of_first = [pages for pages, tile in zip(pages_by_tile(work, together), tiles, strict=True) if 0 in pages]
    assert len(work.first_pages) == (len(of_first) if apart else 0)


@pytest.mark.parametrize("context", [2048, 8192, 131_072])
def test_a_batch_of_one_fills_the_machine(context: int) -> None:
    """132 multiprocessors, three blocks each: all are busy in one wave, as far as there are pages."""
    work = work_list(batch_of((context - 1, 1)), 4, 8, None, False, True, 396)
    blocks, pages = 8 * len(work.items), 8 * (context // 64)
    assert blocks <= 396
    assert blocks >= min(pages, 200)
    lengths = np.sort(lengths_of(work)[work.items[:, 3] >= 0])
    assert lengths[-1] - lengths[1] <= 1  # the own page is part of one


def lengths_of(work: Work) -> Ints:
    end = work.items[:, 3]
    return np.where(end < 0, ~end, end) - work.items[:, 2]


@pytest.mark.parametrize("sequences", [16, 64])
def test_large_batches_end_together(sequences: int) -> None:
    """One wave where it has room for all tiles; else several short ones, the longest items first."""
    depths = [512 * (i + 1) for i in range(sequences)]
    work = work_list(batch_of(*((depth, 1) for depth in depths)), 4, 8, None, False, True, 396)
    lengths = lengths_of(work)
    assert (np.diff(lengths) <= OWN).all()  # an own page comes on top
    assert 8 * len(work.items) <= WAVES * 396
    assert lengths.max() <= 2 * sum(depths) / 64 / len(work.items)


@pytest.mark.parametrize(("sequences", "context"), [(16, 8192), (16, 32_768), (64, 4096), (1, 131_072)])
def test_blocks_end_together(sequences: int, context: int) -> None:
    """Taken by whichever of 396 blocks is free, the items take at most a seventh more than pages without gaps."""
    work = work_list(batch_of(*[(context - 1, 1)] * sequences), 4, 8, None, False, True, 396)
    free = [0] * 396
    for length in lengths_of(work).tolist():
        for _ in range(8):
            heapq.heapreplace(free, free[0] + length)
    assert max(free) <= 8 / 7 * sequences * 8 * (context // 64) / 396


def test_the_size_of_an_item_is_the_best_of_all() -> None:
    """Against every size there is."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        costs = generator.integers(OWN, 60, generator.integers(1, 40)).astype(np.int32)
        blocks = int(generator.integers(1, 50))
        sizes = range(1, int(costs.max()) + 1)
        fits = [[x for x in sizes if -(-costs // x).sum() <= wave * blocks // 2] for wave in range(1, WAVES + 1)]
        times = [(wave * (min(found) + BEGINNING), min(found)) for wave, found in enumerate(fits, 1) if found]
        expected = min(times, key=lambda x: x[0])[1] if times else int(costs.max())
        assert size_of_an_item(costs, 2, blocks) == expected


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("apart", [False, True])
def test_work_that_is_kept_is_what_would_be_made_anew(window: int | None, apart: bool) -> None:
    """Steps of sequences that grow over pages' ends, come and go, and bring several tokens."""
    listed = WorkList(4, 2, window, apart, True, 24)
    starts, cuts = [60, 130, 0, 500, 62], 0
    for step in range(90):
        if step == 40:
            starts[1:3] = [7]
        counts = [1 + (step % 30 == 29 and i == 0) for i in range(len(starts))]
        batch = batch_of(*zip(starts, counts, strict=True))
        before, got = listed._known, listed.of(batch)
        cuts += listed._known is not before
        expected = work_list(batch, 4, 2, window, apart, True, 24)
        for name in ("tiles", "items", "first_pages"):
            assert np.array_equal(getattr(got, name), getattr(expected, name)), (step, name)
        assert (got.rows, got.slots) == (expected.rows, expected.slots)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    assert 5 < cuts < 45


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_partial_results_have_room_for_every_step(apart: bool, joined: bool) -> None:
    """What a graph was recorded for holds the work of all steps that it replays; behind lies other memory."""
    pytest.importorskip("triton")
    from kvbits.kernels.cuda.tables import _work

    count = 16
    generator = np.random.default_rng(0)
    for blocks in (396, 84, 24):
        static = static_layout(count, 1024, 1, int(apart))
        room, tiles, items, first_pages = _work(static, LAYER, apart, joined, blocks, torch.device("cpu"))
        for _ in range(30):
            starts = generator.integers(64, generator.choice([200, 4000, 60_000]), generator.integers(1, count + 1))
            pages = [range((s + 1) // 64 - apart) for s in starts.tolist()]
            sequences = zip(starts.tolist(), pages, strict=True)
            batch = BatchLayout.of([SequencePages(s, 1, p, [1], [1], [2] * apart) for s, p in sequences])
            refill(static, batch)
            work = work_list(batch, 4, 8, None, apart, joined, blocks)
            assert work.slots <= room.slots
            for table, made in ((tiles, work.tiles), (items, work.items), (first_pages, work.first_pages)):
                assert np.array_equal(table[: len(made)].numpy(), made)
            assert (items[len(work.items) :, 0] == -1).all()


def test_which_layers_have_kernels() -> None:
    for dtype in ("bf16", "int8", "int4", "int2", "nf4"):
        assert variant_of(SCHEMES[dtype], LAYER, 4) == replace(variant_of(SCHEMES[dtype], LAYER, 8), tiles=1)
    assert variant_of(SCHEMES["int4"], LAYER, 9) == Variant(4, 4, 128, 2, False)
    reasons = {
        "keys coded as 'int3'": (SCHEMES["int3"], LAYER, 4),
        "values coded as 'int4b32'": (SCHEMES["int4b32"], LAYER, 4),
        "head sizes 80 and 80": (SCHEMES["int4"], replace(LAYER, key_dim=80, value_dim=80), 4),
        "head sizes 192 and 128": (SCHEMES["int4"], replace(LAYER, key_dim=192), 4),
        "17 query heads of a KV head": (SCHEMES["int4"], LAYER, 17),
    }
    for reason, arguments in reasons.items():
        assert reason in str(variant_of(*arguments))


def test_a_backend_that_cannot_run_is_refused_by_name() -> None:
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    pytest.importorskip("triton")
    with pytest.raises(ConfigError, match="the backend 'cuda' cannot run on 'cuda': they need a GPU of NVIDIA's"):
        choose_backend("cuda", "cuda")
    assert choose_backend("auto", "cuda").name == "triton"


def test_layers_without_kernels_are_shown_or_refused() -> None:
    pytest.importorskip("triton")
    from kvbits.kernels.cuda.backend import CudaBackend

    policy = parse_policy("0-1:int4,2-3:int3", 4)
    # named a GPU for Triton's check; nothing runs there
    mixed, only = (CudaBackend("cuda", x, Recorded(), 1) for x in (False, True))
    line = kernels_line(mixed, policy.layers, [LAYER] * 4)
    assert line.startswith("cuda for 2 of 4 layers, triton (no CUDA kernels for keys coded as 'int3'")
    assert mixed.supports(policy.layers[2], LAYER) is None
    assert "no CUDA kernels for keys coded as 'int3'" in str(only.supports(policy.layers[2], LAYER))
    assert only.supports(policy.layers[0], LAYER) is None
    assert kernels_line(ReferenceBackend(), policy.layers, [LAYER] * 4) == "reference"


def test_kernels_are_compiled_before_the_first_request() -> None:
    pytest.importorskip("triton")
    from kvbits.kernels.cuda.backend import CudaBackend

    recorded = Recorded()
    geometry = ModelGeometry("test", (LAYER, replace(LAYER, num_heads=8), LAYER, LAYER), 8192, 16)
    pool = PagedPool.smallest(geometry, parse_policy("0-1:int4,2:int3,3:int8+sink:bf16", 4))
    CudaBackend("cuda", False, recorded, 1).prepare(pool.layers)
    kinds = {(4, 4), (16, 16), (8, 8)}
    assert {(v.keys, v.values, v.tiles) for v in recorded.prepared} == {(*k, tiles) for k in kinds for tiles in (1, 2)}


def test_without_a_compiler_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "NAMES", ("libnvrtc-that-is-not-there.so",))
    nvrtc.library.cache_clear()
    with pytest.raises(UnsupportedError, match=r"run-time compiler \(libnvrtc-that-is-not-there.so\) was not found"):
        nvrtc.library()
    nvrtc.library.cache_clear()


def test_compiled_code_is_kept_by_what_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(nvrtc, "version", lambda: "12.9")
    monkeypatch.setattr(nvrtc, "compile_source", lambda arch, defines: calls.append((arch, defines)) or b"code")
    for arch, defines in (("sm_90", ("A=1",)), ("sm_90", ("A=1",)), ("sm_80", ("A=1",)), ("sm_90", ("A=2",))):
        assert nvrtc.compiled(arch, defines, tmp_path) == b"code"
    assert len(calls) == len(list(tmp_path.iterdir())) == 3
    nvrtc.compiled("sm_90", ("A=1",), Path(sys.executable) / "no folder")  # works without a place to write
    assert len(calls) == 4


def test_shared_memory_fits_every_device() -> None:
    """48 KiB are there without asking; a multiprocessor of the smallest devices has 100, and keeps one for a block."""
    kinds = (RAW, INT8, INT4, INT2, NF4)
    for keys, values, dim, tiles in product(kinds, kinds, DIMS, (1, 2)):
        variant = Variant(keys, values, dim, tiles, False)
        assert variant.shared_bytes <= 48 * 1024
        assert (variant.shared_bytes + 1024) * variant.blocks_at_once <= 100 * 1024


def test_the_count_is_that_of_the_page_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop with transpositions, not the code before, between or after; distances go around it."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import cuda_cycles

    lines = [
        "MOV R1, R2",
        "L0",
        "FADD R1, R1, R2",
        "@P0 BRA `(.L_x_0)",
        "MOVM.16.MT88 R3, R4",
        "L1",
        "HMMA.16816.F32 R8, R4",
    ]
    lines += [
        "LDG.E.128.CONSTANT R4, [R2.64]",
        "@!P1 BRA `(.L_x_2)",
        "MOVM.16.MT88 R3, R9",
        "L2",
        "BRA `(.L_x_1)",
        "EXIT",
    ]
    code = "\n".join(
        f".L_x_{x[1]}:" if x[0] == "L" and x[1:].isdigit() else f"/*{i:04x}*/ {x} ;" for i, x in enumerate(lines)
    )
    loop = cuda_cycles.page_loop(code)
    assert [name for name, _, _ in loop] == ["HMMA", "LDG", "BRA", "MOVM", "BRA"]
    assert cuda_cycles.ahead(loop) == [4]
