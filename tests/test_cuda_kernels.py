"""The CUDA kernels' index maps and arithmetic, emulated lane by lane on real pages, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.attention import Inputs, make_inputs, run
from helpers.emulated import COMPILER, EmulatedBackend, Emulation, error_of

from kvbits.config import LayerGeometry
from kvbits.kernels.reference import ReferenceBackend

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

LAYER = LayerGeometry(4, 1, 64, 64, 64**-0.5)
WIDE = replace(LAYER, key_dim=128, value_dim=128, scale=128**-0.5)
Change = tuple[str, str, str]

BOUND = 2.6e-3
"""What bfloat16 adds to the result alone is 1.7e-3 (2**-9 uniformly, and as much as 1.2 times that by its mantissas);
weights and scaled queries are rounded to 11 bits before, an own page's weights to 8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled kernels are kept."""
    return tmp_path_factory.mktemp("emulated")


def rounded(inputs: Inputs) -> Inputs:
    """With rows that bfloat16 can hold, so that backends get the same ones."""
    query, key, value = ([x.bfloat16().float() for x in part] for part in (inputs.query, inputs.key, inputs.value))
    return Inputs(query, key, value, inputs.sinks)


def error(
    folder: Path,
    layer: LayerGeometry,
    dtype: str,
    length: int,
    new: int = 1,
    blocks: int = 24,
    change: Change | None = None,
) -> float:
    """Of the last ``new`` tokens of a sequence, decoded by the kernels; relative, root of the mean square."""
    inputs = rounded(make_inputs(layer, [length]))
    chunk = length - new
    emulation = Emulation(folder, change)
    expected, _ = run(ReferenceBackend(), layer, dtype, inputs, chunk)
    got, _ = run(EmulatedBackend(emulation, blocks), layer, dtype, inputs, chunk)
    assert emulation.launched
    return error_of(got[0][chunk:], expected[0][chunk:]) if not emulation.faults else float("inf")


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "int2", "nf4"])
def test_every_dtype_and_head_size(folder: Path, dtype: str, dim: int) -> None:
    layer = replace(LAYER, key_dim=dim, value_dim=dim, scale=dim**-0.5)
    assert error(folder, layer, dtype, 331) < BOUND


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "int2", "nf4", "int8/int2"])
def test_several_pages_of_a_warp(folder: Path, dtype: str) -> None:
    """A machine of one block: items of seven pages, of which three warps take two."""
    assert error(folder, WIDE, dtype, 1300, blocks=1) < BOUND


@pytest.mark.parametrize("dtype", ["int8/int2", "int2/int8", "nf4/int4", "bf16/int4", "int4/bf16", "int8/nf4"])
def test_keys_and_values_of_different_dtypes(folder: Path, dtype: str) -> None:
    assert error(folder, WIDE, dtype, 331) < BOUND


@pytest.mark.parametrize("dtype", ["int4", "int8", "nf4"])
@pytest.mark.parametrize("dim", [64, 256])
def test_sixteen_rows(folder: Path, dtype: str, dim: int) -> None:
    """A group of 16 and one new token; the last of them fills its page."""
    layer = LayerGeometry(16, 1, dim, dim, dim**-0.5)
    assert error(folder, layer, dtype, 320) < BOUND


def test_several_queries_over_a_page_boundary(folder: Path) -> None:
    """Four new tokens: two end a page and two begin one, whose pages before are then sealed."""
    assert error(folder, replace(WIDE, num_heads=8, num_kv_heads=2), "int4", 258, new=4) < BOUND


@pytest.mark.parametrize("window", [1, 63, 64, 130])
def test_windows(folder: Path, window: int) -> None:
    assert error(folder, replace(LAYER, window=window), "int4", 331, new=4) < BOUND


def test_soft_caps_sinks_and_windows_together(folder: Path) -> None:
    layer = replace(WIDE, num_heads=5, window=130, softcap=5.0, sinks=True)
    assert error(folder, layer, "int8", 331) < BOUND


@pytest.mark.parametrize("dtype", ["int4+sink:int8", "nf4+sink:bf16", "int2+sink:nf4"])
def test_first_pages_in_a_dtype_of_their_own(folder: Path, dtype: str) -> None:
    assert error(folder, replace(WIDE, num_heads=8, num_kv_heads=2), dtype, 331) < BOUND


def test_sequences_of_all_lengths_in_one_step(folder: Path) -> None:
    """Without a sealed page, at the first token of a page, and with a split of pages for every block."""
    layer = replace(LAYER, num_heads=4, num_kv_heads=2)
    inputs = rounded(make_inputs(layer, [2, 65, 66, 322]))
    expected, _ = run(ReferenceBackend(), layer, "int4", inputs, 1)
    emulation = Emulation(folder)
    got, _ = run(EmulatedBackend(emulation, steps=(0, 1, 63, 64, 65, 321)), layer, "int4", inputs, 1)
    assert not emulation.faults
    assert len(emulation.launched) == 6
    for a, b in zip(got, expected, strict=True):
        for step in (0, 1, 63, 64, 65, 321):
            assert not len(a[step:]) or error_of(a[step], b[step]) < BOUND


MUTATIONS: dict[str, tuple[str, Change]] = {
    "lanes of a value": ("int4", ("codes.cuh", "permute(x[0], x[2], 0x5410)", "permute(x[1], x[2], 0x5410)")),
    "order of keys": ("int4", ("codes.cuh", "y[0] = permute(x[0], x[1], 0x5410), y[1] = permute(x[2], x[3], 0x5410)",
                               "y[1] = permute(x[0], x[1], 0x5410), y[0] = permute(x[2], x[3], 0x5410)")),
    "tokens of a lane": ("int2", ("page.cuh", "16 * (m >> 1) + 4 * (m & 1)", "16 * (m >> 1) + 8 * (m & 1)")),
    "channels of a lane": ("int8", ("codes.cuh", "16 * t : 8 * t", "16 * t : 4 * t")),
    "rows of a product": ("nf4", ("page.cuh", "x[k], y[k], x[k + 1], y[k + 1]", "x[k], x[k + 1], y[k], y[k + 1]")),
    "a codebook's half": ("nf4", ("codes.cuh", "w[0] ^ 0x88888888", "w[0]")),
    "a value's sign": ("int8", ("codes.cuh", "0xe480e480", "0xe400e400")),
    "zeros of a token": ("int4", ("page.cuh", "value_params + 128", "value_params + 0")),
    "half of the own page": ("bf16", ("decode.cu", "64 * page + 32 * half, true", "64 * page, true")),
    "a new token's row": ("int4", ("decode.cu", "+ 64 * page - start", "+ 64 * page - start - 1")),
    "what is merged": ("int4", ("decode.cu", "page += WARPS", "page += WARPS + 1")),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_index_is_noticed(folder: Path, name: str) -> None:
    """Each change of the source makes an error of another size, or an access that a GPU would not make (infinite)."""
    dtype, change = MUTATIONS[name]
    assert error(folder, WIDE, dtype, 1323, blocks=1, change=change) > 4 * BOUND


def test_scales_beyond_what_float16_products_hold(folder: Path) -> None:
    """Keys and values of 1e4 and of 1e-4 in pages of their own, or in one: queries and weights are scaled first."""
    inputs = rounded(make_inputs(WIDE, [331]))
    for rows, small in ((inputs.key, 1e-2), (inputs.value, 1e-4)):
        size = torch.ones(331, 1, 1)
        size[64:128], size[128:160] = 1e4, small
        rows[0] = (rows[0] * size).bfloat16().float()
    inputs.query[0] = (inputs.query[0] * 1e-4).bfloat16().float()
    for dtype in ("int8", "int4", "int2", "nf4"):
        expected, _ = run(ReferenceBackend(), WIDE, dtype, inputs, 330)
        got, _ = run(EmulatedBackend(Emulation(folder)), WIDE, dtype, inputs, 330)
        assert error_of(got[0][330:], expected[0][330:]) < BOUND


@pytest.mark.parametrize("dtype", ["int8", "int4", "int2", "nf4"])
@pytest.mark.parametrize("side", ["key", "value"])
def test_broken_pages_are_noticed(folder: Path, dtype: str, side: str) -> None:
    """An element that is no number makes its scale none, and that reaches the results, as the reference's."""
    inputs = rounded(make_inputs(WIDE, [331]))
    (inputs.key if side == "key" else inputs.value)[0][70, 0, 5] = torch.nan
    expected, _ = run(ReferenceBackend(), WIDE, dtype, inputs, 330)
    got, _ = run(EmulatedBackend(Emulation(folder)), WIDE, dtype, inputs, 330)
    assert expected[0][330:].isnan().any()
    assert torch.equal(got[0][330:].isnan(), expected[0][330:].isnan())
