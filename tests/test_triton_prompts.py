"""Prompts in bfloat16: pages decoded once, in pieces; the kernels in the interpreter or on a GPU where there is one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers.attention import PLAIN, SHAPES, make_inputs
from helpers.attention import run as run_steps
from helpers.driver import Frames
from helpers.on_device import DEVICE, OnDevice

from kvbits.codecs import SCHEMES
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels import BatchLayout, SequencePages
from kvbits.kernels.reference import ReferenceBackend, read_page
from kvbits.pool import LayerView

pytest.importorskip("triton", reason="Triton exists for Linux only")
from kvbits.kernels.triton import backend, pieces
from kvbits.kernels.triton.format import block_of, shape_of
from kvbits.kernels.triton.launch import LayerKernels, run, unpack
from kvbits.kernels.triton.pieces import Tiling, pieces_of
from kvbits.kernels.triton.tables import step_tables

SMALL = LayerGeometry(3, 1, 64, 64, 64**-0.5)
PLAIN_POINTERS = (None, None, None, None)
CHUNKS = [(0, 64), (0, 65), (30, 100), (64, 192), (100, 1), (200, 130), (63, 449), (128, 512), (500, 9)]
"""First new token and new tokens: in and at the edges of pages, 1 to 8 pages; beside a token of a decoding sequence."""


def kernels_of(view: LayerView) -> LayerKernels:
    layer = view.geometry
    sealed = block_of(view.sealed.scheme, layer)
    sink = None if view.first_page is None else block_of(view.first_page.scheme, layer)
    shape = shape_of(layer, sealed, *([] if sink is None else [sink]))
    tiling = Tiling(128, 1, 4, 2)
    opened = block_of(view.open.scheme, layer)
    return LayerKernels(view, shape, sealed, opened, sink, PLAIN_POINTERS, PLAIN_POINTERS, False, tiling)


def worst(layer: LayerGeometry, dtype: str, chunks: list[tuple[int, int]]) -> float:
    """The largest difference to the reference, in one step of all ``chunks``."""
    inputs = make_inputs(layer, [start + count for start, count in chunks])
    # what bfloat16 holds, so that the reference sees the same rows
    rows = [[x.bfloat16().float() for x in part] for part in (inputs.query, inputs.key, inputs.value)]
    outputs = []
    for engine, float_type in ((ReferenceBackend(), torch.float32), (OnDevice(), torch.bfloat16)):
        frames = Frames(ModelGeometry("test", (layer, layer), 8192, 16), dtype, 150)
        view = frames.pool.layers[1]
        first = [s for s, (start, _) in enumerate(chunks) if start]
        head = BatchLayout.of([frames.slice(s, chunks[s][0]) for s in first])
        parts = [torch.cat([x[s][: chunks[s][0]] for s in first]) for x in rows]
        ReferenceBackend().forward(view, head, *parts, inputs.sinks)
        batch = BatchLayout.of([frames.slice(s, count) for s, (_, count) in enumerate(chunks)])
        new = (torch.cat([x[start:] for x, (start, _) in zip(part, chunks, strict=True)]) for part in rows)
        outputs.append(engine.forward(view, batch, *(x.to(float_type) for x in new), inputs.sinks).float())
    return float((outputs[0] - outputs[1]).abs().max())


# weights and results are rounded to 8 bits; of values up to 4.5
TOLERANCE = 2**-8 * 4.5


@pytest.mark.triton
@pytest.mark.parametrize(("scratch", "at_once"), [(1, 2), (2 << 15, 1), (128 << 20, 2)])
def test_chunks_of_all_lengths(monkeypatch: pytest.MonkeyPatch, scratch: int, at_once: int) -> None:
    """A single page at a time, two or whole contexts in a piece; programs that take one page or two at once."""
    monkeypatch.setattr(pieces, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(backend, "tiling_of", lambda *_: Tiling(128, at_once, 4, 2))
    assert worst(SMALL, "bf16", [(0, 65), (30, 100), (100, 1), (190, 90)]) < TOLERANCE


@pytest.mark.triton
@pytest.mark.parametrize("shape", ["window-1", "window-64", "window-130-softcap-sinks"])
def test_windows(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    monkeypatch.setattr(pieces, "SCRATCH_BYTES", 1)
    assert worst(replace(SHAPES[shape], num_heads=3, num_kv_heads=1), "bf16", [(150, 50), (60, 70)]) < TOLERANCE


@pytest.mark.triton
@pytest.mark.parametrize("shape", ["mqa-80", "gqa-5-96", "mha-64", "gqa-2-256", "mla-192-128", "sinks"])
def test_shapes(shape: str) -> None:
    layer = replace(SHAPES[shape], num_heads=SHAPES[shape].group_size, num_kv_heads=1)
    assert worst(layer, "bf16", [(30, 70)]) < TOLERANCE


@pytest.mark.triton
@pytest.mark.parametrize("dtype", ["int8", "int4", "nf4+sink:int8", "int4+sink:nf4"])
def test_coded_pages(dtype: str) -> None:
    """Decoded pages are rounded to bfloat16: well below what the codes themselves lose."""
    inputs = make_inputs(SMALL, [200])
    exact, _ = run_steps(ReferenceBackend(), SMALL, "bf16", inputs, 150)
    coded, pages = run_steps(ReferenceBackend(), SMALL, dtype, inputs, 150)
    four, _ = run_steps(ReferenceBackend(), SMALL, "int4", inputs, 150)
    got, got_pages = run_steps(OnDevice(), SMALL, dtype, inputs, 150, torch.bfloat16)
    assert torch.equal(got_pages[0], pages[0])
    error, noise = (got[0].float() - coded[0])[64:], (four[0] - exact[0])[64:]
    assert error.square().mean().sqrt() <= 0.25 * noise.square().mean().sqrt()


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [*SCHEMES, "nf4+sink:int8", "int4+sink:mix8_4"])
def test_the_kernel_decodes_every_dtype(dtype: str) -> None:
    layer = SMALL
    frames = Frames(ModelGeometry("test", (layer, layer), 8192, 16), dtype, 16)
    view, inputs = frames.pool.layers[1], make_inputs(layer, [130])
    rows = [x[0] for x in (inputs.query, inputs.key, inputs.value)]
    batch = BatchLayout.of([frames.slice(0, 130)])
    ReferenceBackend().forward(view, batch, *rows, None)
    on_device = replace(view, buffer=view.buffer.to(DEVICE))
    tables = step_tables(batch, view.first_page is not None, torch.device(DEVICE))
    slots = torch.tensor([[0, 1], [0, 0]], dtype=torch.int32, device=DEVICE)
    decoded = unpack(run, kernels_of(on_device), tables, slots, torch.float32)
    places = [(view.sealed, int(frame)) for frame in batch.sealed[0]]
    if view.first_page is not None:
        places[0] = view.first_page, int(batch.sink[0, view.first_page.frame])
    for slot, (place, frame) in enumerate(reversed(places)):
        for got, x in zip(decoded, read_page(view, place, frame), strict=True):
            part = got[0, 64 * slot : 64 * (slot + 1)].cpu()
            torch.testing.assert_close(part, x[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 64, 130])
@pytest.mark.parametrize("most", [1, 3, 7, 100])
def test_pieces(monkeypatch: pytest.MonkeyPatch, most: int, window: int | None) -> None:
    """Every row sees each of its pages once, in order, at the slot where it lies; each page is decoded once."""
    layer = replace(PLAIN, window=window)
    monkeypatch.setattr(pieces, "SCRATCH_BYTES", most * 64 * 2 * 128 * 2)
    batch = BatchLayout.of([SequencePages(s, n, range((s + n) // 64), range(1), range(1)) for s, n in CHUNKS])
    found, _ = pieces_of(batch, layer, 128, torch.device("cpu"))
    decoded: Counter[tuple[int, int]] = Counter()
    seen: dict[tuple[int, int], list[int]] = {}
    begun, ended = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for piece in found:
        slots = [(s, p) for s, p in piece.pages.tolist()]
        assert len(slots) <= most
        decoded.update(slots)
        for s, first, count, low, high, slot, begins, ends in piece.tiles.tolist():
            assert slots[slot : slot + high - low] == [(s, p) for p in range(low, high)]
            for row in range(first, first + count):
                assert bool(begins) == ((s, row) not in seen)
                assert not ended[s, row]
                begun[s, row] += begins
                ended[s, row] += ends
                seen.setdefault((s, row), []).extend(range(low, high))
    needed = set()
    for s, (start, count) in enumerate(CHUNKS):
        for row in range(3 * count if count > 1 else 0):
            position = start + row // 3
            own, oldest = position // 64, 0 if window is None else max(position - window + 1, 0) // 64
            assert seen[s, row][-(own - oldest) :] == list(range(oldest, own)) or own == oldest
            assert seen[s, row] == sorted(set(seen[s, row]))
            assert begun[s, row] == ended[s, row] == 1
            needed |= {(s, page) for page in range(oldest, own)}
    assert needed <= set(decoded)
    assert set(decoded.values()) <= {1}
