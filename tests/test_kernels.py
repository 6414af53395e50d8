"""The C++ kernels against the reference backend, and against themselves: bytes, numbers, bits."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.attention import (
    PLAIN,
    SHAPES,
    Inputs,
    assert_agrees,
    check_read_again,
    check_tentative_step,
    make_inputs,
    run,
)
from helpers.driver import Driver, Frames
from helpers.serving import packed_byte_model
from torch import Tensor

from kvbits.codecs import OPEN, SCHEMES, Codec, Rounding, Scheme, Side, codecs_in_use, names
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError
from kvbits.kernels import Backend, BatchLayout, SequencePages, cpu
from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.kernels.reference import ReferenceBackend

DTYPES = [*SCHEMES, "int8,int4", "bf16,int4", "int4/int8h", "int4/nf3"]


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
@pytest.mark.parametrize("dtype", [d for d in names.DTYPES if "mix" not in d] + ["int4+sink:int8"])
def test_latents_in_every_kind_of_page(dtype: str, isa: str) -> None:
    assert_agrees(LayerGeometry(5, 1, 96, 64, 0.2, latent=True), dtype, isa, [63, 200])


def test_latents_without_kernels_are_refused_by_name() -> None:
    layer = LayerGeometry(5, 1, 128, 64, 0.2, latent=True)
    assert CpuBackend().supports(SCHEMES["int4"], layer) is None
    assert CpuBackend().supports(SCHEMES["mix8_4"], layer) == "there are no kernels for latents coded as 'mix8_4'"


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("size", [1, 50, 64, 96, 1100])
def test_chunks(size: int, isa: str) -> None:
    """A chunk ends within a page, at the end of one, and behind a split."""
    assert_agrees(replace(PLAIN, window=size, chunked=True), "int8", isa, [2200 if size > 1000 else 200, 65])


@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_layers_that_read_the_same_keys_again(backend: type[Backend]) -> None:
    check_read_again(backend())


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


@pytest.mark.parametrize("isa", [isa for isa in available_isas() if not isa.startswith("amx")])  # see test_tiles
def test_bfloat16_rows_give_the_float32_result_rounded(isa: str) -> None:
    inputs = make_inputs(PLAIN, [150])
    rounded = Inputs(*([x.bfloat16().float() for x in part] for part in (inputs.query, inputs.key, inputs.value)), None)
    wide, pages = run(CpuBackend(isa), PLAIN, "int4", rounded)
    narrow, narrow_pages = run(CpuBackend(isa), PLAIN, "int4", inputs, float_type=torch.bfloat16)
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
    check_tentative_step(backend)


def test_wrong_choices_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'sse9' does not run here; choose from .*scalar"):
        CpuBackend("sse9")
    with pytest.raises(ConfigError, match="threads is 0"):
        CpuBackend(threads=0)
    wide = LayerGeometry(1, 1, 1024, 64, 1.0)
    assert "1024" in str(CpuBackend().supports(SCHEMES["int8"], wide))
    assert CpuBackend().supports(SCHEMES["int4"], PLAIN) is None


@pytest.mark.parametrize("isa", available_isas())
def test_the_codecs_of_python_are_those_of_the_kernels(isa: str) -> None:
    """No number stands for two codecs, and whatever has one has kernels for the sides that a scheme uses."""
    known = CpuBackend(isa).native.codecs()
    assert len({number for number, _, _ in known}) == len(known)
    sides = {(number, side) for number, *has in known for side, one in zip(("key", "value"), has, strict=True) if one}
    used = {(codec.native_id, side): replace(codec, name="") for codec, side in codecs_in_use().values()}
    assert set(used) <= sides
    assert {number for number, _, _ in known} == {number for number, _ in used}
    for codec, side in codecs_in_use().values():
        assert used[codec.native_id, side] == replace(codec, name=""), (codec.native_id, side)
    assert {(0, "key"), (0, "value")} <= sides, "the open page"


@dataclass(frozen=True)
class Halved(Codec):
    """A codec that the kernels know nothing of: half of each element, in bfloat16."""

    def page_bytes(self, dim: int) -> int:
        return OPEN.key.page_bytes(dim)

    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        return OPEN.key.encode(rows / 2, side)

    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        return 2 * OPEN.key.decode(page, dim, side)


HALVED = Scheme(Halved("halved"), Halved("halved"))


@pytest.mark.parametrize("text", ["halved", "int4,halved", "int8+sink:halved"])
def test_a_codec_without_kernels_runs_slowly(
    text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(SCHEMES, "halved", HALVED)
    monkeypatch.setitem(names.DTYPES, "halved", names.Dtype(16, 16, ""))
    layer = replace(PLAIN, window=150)
    inputs = make_inputs(layer, [200])
    backend = CpuBackend()
    assert backend.supports(HALVED, layer) is None
    assert "head size 24" in str(backend.supports(HALVED, LayerGeometry(1, 1, 24, 64, 1.0)))
    (got,), pages = run(backend, layer, text, inputs, 70)
    (expected,), wanted = run(ReferenceBackend(), layer, text, inputs, 70)
    assert torch.equal(got, expected)
    assert torch.equal(pages[0], wanted[0])
    assert "which is slow" in caplog.text


def test_a_fused_model_leaves_a_codec_without_kernels_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "halved", HALVED)
    monkeypatch.setitem(names.DTYPES, "halved", names.Dtype(16, 16, ""))
    loaded = packed_byte_model()
    prompt = list(range(100, 250))
    assert loaded.fused is not None
    got = Driver(loaded, "halved", CpuBackend()).step({0: prompt})[0]
    assert torch.equal(got, Driver(loaded, "halved", ReferenceBackend()).step({0: prompt})[0])


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
