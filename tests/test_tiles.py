"""Attention on AMX's tiles, the processor's or emulated; what every instruction set is tested for is in other files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.attention import PLAIN, SHAPES, Inputs, make_inputs, run
from torch import Tensor

from kvbits.codecs import SCHEMES, codecs_in_use
from kvbits.config import LayerGeometry
from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.kernels.reference import ReferenceBackend

TILES = [isa for isa in available_isas() if isa.startswith("amx")]
ON_TILES = pytest.mark.parametrize("isa", TILES)
FLOATS = ["bf16", "fp8_e4m3", "fp8_e5m2"]
MANY = replace(PLAIN, num_heads=14, window=150)
"""7 query heads a KV head: 56 rows of 8 tokens, in four blocks, and blocks that are no tile's height."""
CODES = {
    "plain": replace(MANY, window=None),
    "wide-192": replace(MANY, key_dim=192, value_dim=192, window=None),
    "wide-256-window-softcap-sinks": replace(MANY, key_dim=256, value_dim=256, softcap=5.0, sinks=True),
    "latent-16-576": SHAPES["latent-16-576"],
}
"""Integer codes meet tiles in wide heads only."""

pytestmark = pytest.mark.skipif(not TILES, reason="neither AMX nor a build for developers on AVX-512 with BF16")


def bfloat16_inputs(layer: LayerGeometry, lengths: list[int]) -> Inputs:
    inputs = make_inputs(layer, lengths)
    parts = ([x.bfloat16().float() for x in part] for part in (inputs.query, inputs.key, inputs.value))
    return Inputs(*parts, inputs.sinks)


def assert_rounded(got: list[Tensor], expected: list[Tensor], more: float) -> None:
    """Off by the rounding to bfloat16 and, on the whole, by less than ``more`` beside it."""
    found, exact = torch.cat(got).float(), torch.cat(expected)
    half_ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - 8)
    assert found.isfinite().all()
    assert ((found - exact).abs() - 1.01 * half_ulp).max() <= more


@ON_TILES
@pytest.mark.parametrize("dtype", [d for d in SCHEMES if d not in FLOATS])
@pytest.mark.parametrize("shape", CODES)
def test_integer_codes_give_the_vectors_bits(shape: str, dtype: str, isa: str) -> None:
    """Sums of products of bytes are exact; float32 rows meet their own page in the vectors' kernels."""
    layer = CODES[shape]
    if SCHEMES[dtype].supports(layer):
        pytest.skip("no such head size")
    inputs = make_inputs(layer, [65, 333])
    for draft in (False, True):
        expected, pages = run(CpuBackend("avx512"), layer, dtype, inputs, draft=draft)
        got, got_pages = run(CpuBackend(isa), layer, dtype, inputs, draft=draft)
        for a, b in zip([*expected, *pages], [*got, *got_pages], strict=True):
            assert torch.equal(a, b)


@ON_TILES
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ["plain", *SHAPES])
def test_float_pages_against_the_reference(shape: str, dtype: str, isa: str) -> None:
    """Products are exact and weights have 16 bits: what the result's rounding to bfloat16 does not explain is small."""
    layer = MANY if shape == "plain" else SHAPES[shape]
    inputs = bfloat16_inputs(layer, [1, 65, 200])
    expected, _ = run(ReferenceBackend(), layer, dtype, inputs)
    for chunk in (1000, 5):
        got, _ = run(CpuBackend(isa), layer, dtype, inputs, chunk, float_type=torch.bfloat16)
        assert_rounded(got, expected, 2e-5)


@ON_TILES
@pytest.mark.parametrize("dtype", SCHEMES)
def test_bfloat16_rows_of_every_dtype(dtype: str, isa: str) -> None:
    """As near to the vectors' results in float32 as the open page's kernel is."""
    inputs = bfloat16_inputs(MANY, [63, 200])
    expected, pages = run(CpuBackend("avx512"), MANY, dtype, inputs)
    got, got_pages = run(CpuBackend(isa), MANY, dtype, inputs, float_type=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(pages, got_pages, strict=True))
    assert_rounded(got, expected, 2e-5)


@ON_TILES
@pytest.mark.parametrize("dtype", [*SCHEMES, "int8+sink:bf16", "nf4+sink:int8", "bf16/int4"])
def test_same_bits_whatever_the_chunk(dtype: str, isa: str) -> None:
    """From one token of one head's worth of rows to all at once, from any place in a page."""
    inputs = bfloat16_inputs(MANY, [150, 65, 1])
    outputs, pages = run(CpuBackend(isa, threads=2), MANY, dtype, inputs, float_type=torch.bfloat16)
    for chunk, alone in [(1, False), (7, True), (50, False), (64, True)]:
        again, pages_again = run(CpuBackend(isa), MANY, dtype, inputs, chunk, torch.bfloat16, alone)
        for a, b in zip([*outputs, *pages], [*again, *pages_again], strict=True):
            assert torch.equal(a, b), (chunk, alone)


@ON_TILES
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_same_bits_whatever_the_heads_rows(dim: int, isa: str) -> None:
    """A query's result does not know how many others share its KV head's tiles."""
    layer = LayerGeometry(32, 2, dim, dim, dim**-0.5)
    inputs = bfloat16_inputs(layer, [70])
    (whole,), _ = run(CpuBackend(isa), layer, "int8", inputs, float_type=torch.bfloat16)
    for heads in (1, 3, 5, 9):
        of_each = torch.cat([torch.arange(heads), torch.arange(16, 16 + heads)])
        fewer = replace(inputs, query=[inputs.query[0][:, of_each]])
        part = replace(layer, num_heads=2 * heads)
        (got,), _ = run(CpuBackend(isa), part, "int8", fewer, 9, torch.bfloat16)
        assert torch.equal(got, whole[:, of_each]), heads


@ON_TILES
@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3", "int8"])
def test_what_is_no_number_stays_with_its_head(dtype: str, isa: str) -> None:
    layer = replace(MANY, window=None, key_dim=80, value_dim=80)
    for what, chunk in (("query", 1000), ("key", 1), ("key", 1000), ("value", 1), ("value", 1000)):
        inputs = bfloat16_inputs(layer, [130])
        getattr(inputs, what)[0][70 if what == "query" else 9, 1, 3] = torch.nan
        (out,), _ = run(CpuBackend(isa), layer, dtype, inputs, chunk, torch.bfloat16)
        broken = out[70, 1:2] if what == "query" else out[9:, 7:]
        whole = [out[:70], out[71:], out[70, :1], out[70, 2:]] if what == "query" else [out[:, :7]]
        assert broken.isnan().any(-1).all(), (what, chunk)
        assert all(part.isfinite().all() for part in whole), (what, chunk)


@ON_TILES
def test_tiles_are_in_use(isa: str) -> None:
    """16-bit pages' sums have another order there, so not all bits are the vectors'; every codec has its kernels."""
    inputs = bfloat16_inputs(replace(PLAIN, key_dim=128, value_dim=128), [64])
    layer = replace(PLAIN, key_dim=128, value_dim=128)
    # One rounding of the result hides most: enough elements show some.
    vectors, _ = run(CpuBackend("avx512"), layer, "bf16", inputs, float_type=torch.bfloat16)
    tiles, _ = run(CpuBackend(isa), layer, "bf16", inputs, float_type=torch.bfloat16)
    assert not torch.equal(vectors[0], tiles[0])
    many = {
        (number, side)
        for number, *has in CpuBackend(isa).native.many_rows()
        for side, one in zip(("key", "value"), has, strict=True)
        if one
    }
    assert many >= {(codec.native_id, side) for codec, side in codecs_in_use().values()}
    assert CpuBackend("avx512").native.many_rows() == []
