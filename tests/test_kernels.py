"""The C++ kernels against the reference backend, and against themselves: bytes, numbers, bits."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.driver import Frames
from torch import Tensor

from kvbits.codecs import SCHEMES, parse_policy
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError
from kvbits.kernels import Backend, BatchLayout, SequencePages, cpu
from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.kernels.reference import ReferenceBackend

DTYPES = [*SCHEMES, "int8,int4", "bf16,int4", "int4/int8h", "int4/nf3"]
PLAIN = LayerGeometry(6, 2, 64, 64, 64**-0.5)
SHAPES = {
    "mha-64": replace(PLAIN, num_heads=2),
    "mqa-80": LayerGeometry(8, 1, 80, 80, 80**-0.5),
    "gqa-5-96": LayerGeometry(5, 1, 96, 96, 0.11),
    "gqa-4-128": LayerGeometry(8, 2, 128, 128, 128**-0.5),
    "gqa-2-256": LayerGeometry(2, 1, 256, 256, 256**-0.5),
    "mla-192-128": LayerGeometry(2, 2, 192, 128, 192**-0.5),
    "softcap": replace(PLAIN, softcap=3.0),
    "sinks": replace(PLAIN, sinks=True),
    "window-1": replace(PLAIN, window=1),
    "window-63": replace(PLAIN, window=63),
    "window-64": replace(PLAIN, window=64),
    "window-130-softcap-sinks": replace(PLAIN, window=130, softcap=5.0, sinks=True),
}


@dataclass
class Inputs:
    """Rows of several sequences, and the numbers that attention has to produce from them."""

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    sinks: Tensor | None


def make_inputs(layer: LayerGeometry, lengths: list[int], seed: int = 0) -> Inputs:
    """Keys with a few loud channels and an offset, as models have them; queries that attend sharply and broadly."""
    g = torch.Generator().manual_seed(seed)
    loud = torch.ones(layer.key_dim)
    loud[:: layer.key_dim // 4] = 5.0
    offset = torch.randn(layer.num_kv_heads, layer.key_dim, generator=g) * loud
    query, key, value = [], [], []
    for n in lengths:
        sharpness = torch.rand(n, layer.num_heads, 1, generator=g) * 2
        query.append(torch.randn(n, layer.num_heads, layer.key_dim, generator=g) * sharpness)
        key.append(torch.randn(n, layer.num_kv_heads, layer.key_dim, generator=g) * loud + offset)
        value.append(torch.randn(n, layer.num_kv_heads, layer.value_dim, generator=g))
    sinks = torch.randn(layer.num_heads, generator=g) if layer.sinks else None
    return Inputs(query, key, value, sinks)


def run(
    backend: Backend,
    layer: LayerGeometry,
    dtype: str,
    inputs: Inputs,
    chunk: int = 1000,
    float_type: torch.dtype = torch.float32,
    alone: bool = False,
    draft: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and sealed pages of every sequence, ``chunk`` tokens a step, all sequences in one step or each alone."""
    geometry = ModelGeometry("test", (layer, layer), 8192, 16)
    need = sum(len(q) // 64 + 8 for q in inputs.query) * 2
    frames = Frames(geometry, dtype, need)
    view = frames.pool.layers[1]  # not the first: an offset of 0 would hide that it is ignored
    done = [0] * len(inputs.query)
    outputs: list[list[Tensor]] = [[] for _ in inputs.query]
    while True:
        waiting = [s for s, q in enumerate(inputs.query) if done[s] < len(q)]
        if not waiting:
            break
        waiting = waiting[:1] if alone else waiting
        counts = [min(chunk, len(inputs.query[s]) - done[s]) for s in waiting]
        batch = BatchLayout.of([frames.slice(s, n) for s, n in zip(waiting, counts, strict=True)], draft)

        def rows(parts: list[Tensor], waiting: list[int] = waiting, counts: list[int] = counts) -> Tensor:
            pieces = [parts[s][done[s] : done[s] + n] for s, n in zip(waiting, counts, strict=True)]
            return torch.cat(pieces).to(float_type)

        out = backend.forward(view, batch, rows(inputs.query), rows(inputs.key), rows(inputs.value), inputs.sinks)
        for s, n, part in zip(waiting, counts, out.split(counts), strict=True):
            outputs[s].append(part)
            done[s] += n
    place = view.sealed
    size = place.scheme.layer_bytes(layer)
    pages = [frames.page_bytes(s)[:, place.offset : place.offset + size] for s in range(len(done))]
    return [torch.cat(parts) for parts in outputs], pages


def assert_agrees(layer: LayerGeometry, dtype: str, isa: str, lengths: list[int], draft: bool = False) -> None:
    """Page bytes equal; outputs within what the kernel's arithmetic explains.

    16-bit pages: products are exact and summed in float32, so 2e-5 covers the order of summation. Integer pages: the
    query and the softmax weights are rounded to 8 bits (codes of up to 4 bits) or about 15 bits (finer codes). Against
    the rounding of the codes themselves that is small: its energy stays below 1/16 of what the codec adds to the exact
    result, and no single element is off by more than the codec's largest error.
    """
    inputs = make_inputs(layer, lengths)
    expected, expected_pages = run(ReferenceBackend(), layer, dtype, inputs, draft=draft)
    exact, _ = run(ReferenceBackend(), layer, "bf16", inputs)
    got, pages = run(CpuBackend(isa), layer, dtype, inputs, draft=draft)
    for a, b in zip(pages, expected_pages, strict=True):
        assert torch.equal(a, b)
    error = torch.cat(got) - torch.cat(expected)
    assert torch.isfinite(error).all()
    codec = torch.cat(expected) - torch.cat(exact)
    assert error.square().mean().sqrt() <= 0.25 * codec.square().mean().sqrt() + 2e-6
    assert error.abs().max() <= codec.abs().max() + 2e-5


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: str, isa: str) -> None:
    assert_agrees(PLAIN, dtype, isa, [1, 63, 64, 65, 129, 200])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape: str, dtype: str, isa: str) -> None:
    assert_agrees(SHAPES[shape], dtype, isa, [65, 200])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", ["int8h", "fp8_e4m3", "fp8_e5m2", "nf4", "nf2"])
@pytest.mark.parametrize("shape", ["mqa-80", "gqa-5-96", "gqa-4-128", "mla-192-128", "window-130-softcap-sinks"])
def test_more_shapes(shape: str, dtype: str, isa: str) -> None:
    assert_agrees(SHAPES[shape], dtype, isa, [65, 200])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", ["nf4+sink:int8", "int4+sink:nf4", "nf3+sink:nf4", "bf16/nf4+sink:bf16"])
def test_rotated_values_beside_others(dtype: str, isa: str) -> None:
    """The accumulator changes its basis between a first page, the others and the open page."""
    assert_agrees(replace(PLAIN, window=1300), dtype, isa, [65, 1500])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", ["int8h", "int8h/int4", "int4/int8h"])
@pytest.mark.parametrize("shape", ["mqa-80", "gqa-5-96", "mla-192-128", "window-130-softcap-sinks"])
def test_drafts(shape: str, dtype: str, isa: str) -> None:
    assert_agrees(SHAPES[shape], dtype, isa, [65, 200], draft=True)


@pytest.mark.parametrize("isa", available_isas())
def test_a_draft_step_stores_what_any_step_stores(isa: str) -> None:
    inputs = make_inputs(PLAIN, [150, 70])
    full, pages = run(CpuBackend(isa), PLAIN, "int8h", inputs, chunk=50)
    draft, draft_pages = run(CpuBackend(isa), PLAIN, "int8h", inputs, chunk=50, draft=True)
    assert all(torch.equal(a, b) for a, b in zip(pages, draft_pages, strict=True))
    assert torch.equal(full[0][:64], draft[0][:64])  # a token's own page is 16 bit either way
    assert not torch.equal(full[0][64:], draft[0][64:])


@pytest.mark.parametrize("dtype", [d for d in SCHEMES if d != "int8h"])
def test_other_codecs_have_one_way_to_be_read(dtype: str) -> None:
    inputs = make_inputs(PLAIN, [150])
    full, _ = run(CpuBackend(), PLAIN, dtype, inputs)
    draft, _ = run(CpuBackend(), PLAIN, dtype, inputs, draft=True)
    assert torch.equal(full[0], draft[0])


@pytest.mark.parametrize("isa", available_isas())
def test_more_than_one_split(isa: str) -> None:
    assert_agrees(replace(PLAIN, num_heads=3, num_kv_heads=1), "int4", isa, [2200])
    assert_agrees(replace(PLAIN, num_heads=3, num_kv_heads=1, window=1100), "int8", isa, [2200])


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whatever_the_batch_the_chunk_and_the_threads(dtype: str, isa: str) -> None:
    layer = replace(PLAIN, window=150)
    inputs = make_inputs(layer, [200, 64, 65, 130, 1])
    outputs, pages = run(CpuBackend(isa, threads=2), layer, dtype, inputs)
    for chunk, alone, threads in [(7, False, 1), (1, False, 2), (64, True, 3), (1000, True, 2)]:
        again, pages_again = run(CpuBackend(isa, threads=threads), layer, dtype, inputs, chunk, alone=alone)
        for a, b in zip([*outputs, *pages], [*again, *pages_again], strict=True):
            assert torch.equal(a, b), (chunk, alone, threads)


@pytest.mark.parametrize("chunk", [1, 64, 700])
def test_same_bits_across_splits(chunk: int) -> None:
    layer = replace(PLAIN, num_heads=3, num_kv_heads=1, window=1500)
    inputs = make_inputs(layer, [2300])
    expected, _ = run(CpuBackend(), layer, "int4", inputs)
    got, _ = run(CpuBackend(), layer, "int4", inputs, chunk)
    assert torch.equal(expected[0], got[0])


def test_bfloat16_rows_give_the_float32_result_rounded() -> None:
    inputs = make_inputs(PLAIN, [150])
    rounded = Inputs(*([x.bfloat16().float() for x in part] for part in (inputs.query, inputs.key, inputs.value)), None)
    wide, pages = run(CpuBackend(), PLAIN, "int4", rounded)
    narrow, narrow_pages = run(CpuBackend(), PLAIN, "int4", inputs, float_type=torch.bfloat16)
    assert torch.equal(wide[0].bfloat16(), narrow[0])
    assert torch.equal(pages[0], narrow_pages[0])


def test_own_threads_instead_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(PLAIN, [300, 70])
    expected, _ = run(CpuBackend(threads=2), PLAIN, "int8", inputs, chunk=100)
    monkeypatch.setattr(cpu, "_gomp_parallel", lambda: 0)
    got, _ = run(CpuBackend(threads=3), PLAIN, "int8", inputs, chunk=100)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_strided_rows() -> None:
    """transformers hands over transposed views; their strides must be followed."""
    inputs = make_inputs(PLAIN, [90])
    expected, _ = run(CpuBackend(), PLAIN, "int4", inputs)
    heads_first = Inputs(
        *(
            [x.transpose(0, 1).contiguous().transpose(0, 1) for x in part]
            for part in (inputs.query, inputs.key, inputs.value)
        ),
        None,
    )
    frames = Frames(ModelGeometry("test", (PLAIN, PLAIN), 8192, 16), "int4", 16)
    batch = BatchLayout.of([frames.slice(0, 90)])
    rows = (heads_first.query[0], heads_first.key[0], heads_first.value[0])
    assert not rows[0].is_contiguous()
    out = CpuBackend().forward(frames.pool.layers[1], batch, *rows, None)
    assert torch.equal(out, expected[0])


@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_a_tentative_step_leaves_the_head_page_as_it_was(backend: type[Backend]) -> None:
    """A step over a page boundary with a second open page: the first keeps its rows, the second gets the rest."""
    inputs = make_inputs(PLAIN, [70])
    geometry = ModelGeometry("test", (PLAIN, PLAIN), 8192, 16)
    parts = [x[0] for x in (inputs.query, inputs.key, inputs.value)]

    def states(tentative: bool) -> tuple[Tensor, Tensor, Tensor]:
        frames = Frames(geometry, "int4", 32)
        view, engine = frames.pool.layers[1], backend()
        engine.forward(view, BatchLayout.of([frames.slice(0, 60)]), *(x[:60] for x in parts), None)
        step = frames.slice(0, 10)
        spare = [frames._free.pop() for _ in step.head]
        if tentative:
            step = replace(step, tail=spare)
        before = frames.open_bytes(0)
        out = engine.forward(view, BatchLayout.of([step]), *(x[60:] for x in parts), None)
        size = view.open.scheme.layer_bytes(PLAIN)
        place = view.open
        tail = frames.pool.buffer[step.tail[place.frame], place.offset : place.offset + size]
        if tentative:
            kept = frames.open_bytes(0)
            # Rows 0 to 59 are untouched; 60 to 63 were appended.
            codec = place.scheme.value
            first = place.scheme.key.page_bytes(64)
            old, new = (
                codec.decode(x[place.frame, place.offset + first : place.offset + first + 8192], 64, "value")
                for x in (before, kept)
            )
            assert torch.equal(old[:60], new[:60])
            assert torch.equal(new[60:64], parts[2][60:64, 0].bfloat16().float())
        return out, frames.page_bytes(0), tail

    plain, tentative = states(False), states(True)
    assert torch.equal(plain[0], tentative[0])
    place_size = parse_policy("int4", 1).layers[0].layer_bytes(PLAIN)
    assert torch.equal(plain[1][:, place_size : 2 * place_size], tentative[1][:, place_size : 2 * place_size])
    rows = [parse_policy("bf16", 1).layers[0].key.decode(x[:8192], 64, "key")[:6] for x in (plain[2], tentative[2])]
    assert torch.equal(rows[0], rows[1])


def test_wrong_choices_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'sse9' does not run here; choose from .*scalar"):
        CpuBackend("sse9")
    with pytest.raises(ConfigError, match="threads is 0"):
        CpuBackend(threads=0)
    wide = LayerGeometry(1, 1, 1024, 64, 1.0)
    assert "1024" in str(CpuBackend().supports(SCHEMES["int8"], wide))
    assert CpuBackend().supports(SCHEMES["int4"], PLAIN) is None


def test_a_row_outside_the_batch_is_an_assertion() -> None:
    frames = Frames(ModelGeometry("test", (PLAIN, PLAIN), 8192, 16), "int4", 16)
    batch = BatchLayout.of([SequencePages(0, 4, [], frames.slice(0, 4).head, frames.slice(0, 1).tail)])
    q, k = torch.zeros(5, 6, 64), torch.zeros(5, 2, 64)
    with pytest.raises(AssertionError):
        CpuBackend().forward(frames.pool.layers[0], batch, q, k, k, None)


def test_no_instruction_set_leaks_into_another() -> None:
    """An inline function compiled with AVX-512 flags must not be one that the linker could give to baseline code."""
    root = Path(__file__).parent.parent
    kinds = ("kernels", "rows")
    objects = [p for kind in kinds for p in sorted(root.glob(f"build/*/CMakeFiles/{kind}_*.dir/csrc/isa/*.o"))]
    assert len(objects) > len(kinds), "the build directory of `make test` holds the objects"
    for path in objects:
        listing = subprocess.run(["nm", "-C", "--defined-only", str(path)], check=True, capture_output=True, text=True)
        shared = [line for line in listing.stdout.splitlines() if line.split()[1] not in "tdrb"]
        names = {line.split(maxsplit=2)[2] for line in shared}
        stem = path.name.removesuffix(".cpp.o")
        face = f"{stem.removeprefix('rows_')}_rows()" if stem.startswith("rows_") else f"{stem}_kernels()"
        assert names == {f"kvbits::{face}"}, (path.name, names)
