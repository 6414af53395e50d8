"""Page bytes at the edges: the kernels' against the reference's, and what they mean."""

from __future__ import annotations

import pytest
import torch
from helpers.attention import PLAIN, Inputs, run
from helpers.driver import Driver
from helpers.hard_pages import assert_same, broken_pages, expected, hard_pages, sealed
from helpers.huge import assert_huge_pages_are_read
from helpers.rounding import DTYPES as ROUNDED
from helpers.rounding import rounding_of
from helpers.tiny import tiny_model
from torch import Tensor

from kvbits.codecs import SCHEMES, codecs_in_use
from kvbits.config import LayerGeometry
from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.kernels.reference import ReferenceBackend
from kvbits.models.load import wrap

PAGES = {dim: hard_pages(dim, 2) | broken_pages(dim, 2) for dim in (64, 96, 128)}


def pages_for(dtype: str, dim: int) -> dict[str, Tensor]:
    """Which NaN a bfloat16 page holds is not defined."""
    return {what: page for what, page in PAGES[dim].items() if dtype != "bf16" or not page.isnan().any()}


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", SCHEMES)
def test_every_isa_writes_the_bytes_of_the_reference(dtype: str, isa: str) -> None:
    for dim in PAGES:
        pages = pages_for(dtype, dim)
        if SCHEMES[dtype].supports(LayerGeometry(2, 2, dim, dim, 0.1)) is None:
            assert_same(sealed(CpuBackend(isa), dtype, pages), expected(dtype, pages), list(pages))


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("dtype", [*ROUNDED, "mix8_4", "int4b32", "int4b64"])
def test_calibrated_rounding_too(dtype: str, clip: float | None, isa: str) -> None:
    """With feedback, and with clips and an order of channels."""
    pages = PAGES[64]
    rounding = rounding_of(LayerGeometry(2, 2, 64, 64, 0.125), clip)
    assert_same(sealed(CpuBackend(isa), dtype, pages, rounding), expected(dtype, pages, rounding), list(pages))


@pytest.mark.parametrize("name", codecs_in_use())
def test_finite_rows_decode_to_finite_rows(name: str) -> None:
    codec, side = codecs_in_use()[name]
    for what, page in hard_pages(64).items():
        rows = page.bfloat16().float().transpose(0, 1)
        decoded = codec.decode(codec.encode(rows, side), 64, side)
        assert decoded.isfinite().all(), what
        # saturated groups shrink; nothing grows but by the rounding of rotated elements, which all add up
        assert decoded.abs().max() <= 32 * rows.abs().max() + 1e-6, what


@pytest.mark.parametrize("name", codecs_in_use())
def test_a_row_of_zeros_stays_one(name: str) -> None:
    """In a page of zeros, and (but for a key's rounding, which is its channel's) among others."""
    codec, side = codecs_in_use()[name]
    zeros = torch.zeros(1, 64, 64)
    assert not codec.decode(codec.encode(zeros, side), 64, side).any()
    if side == "value":
        rows = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
        rows[0, 7] = 0.0
        rows = rows.bfloat16().float()
        if "fp8" not in name:
            assert not codec.decode(codec.encode(rows, side), 64, side)[0, 7].any()


@pytest.mark.parametrize("name", codecs_in_use())
def test_what_is_no_number_is_read_as_none(name: str) -> None:
    """An element that is NaN or infinite is not read as a number, and only its own group suffers."""
    codec, side = codecs_in_use()[name]
    for what, page in broken_pages(64).items():
        rows = page.bfloat16().float().transpose(0, 1)
        decoded = codec.decode(codec.encode(rows, side), 64, side)
        assert not decoded[~rows.isfinite()].isfinite().any(), what
        if what.startswith("one ") and not name.startswith("fp8"):
            broken = ~decoded[0].isfinite()
            assert broken[9].all() or broken[:, 3].all() or broken.sum() in (1, 32), what
            assert broken.sum() <= 64, what


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_huge_numbers_in_float8_pages(dtype: str, isa: str) -> None:
    assert_huge_pages_are_read(CpuBackend(isa), dtype)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", SCHEMES)
def test_a_zero_row_changes_nothing_of_the_others(dtype: str, isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(70, n, 64, generator=g) for n in (6, 2, 2)]
    rows[1][7] = rows[2][7] = 0.0
    rows[1][:, :, 5] = 3.0
    inputs = Inputs(*([x] for x in rows), None)
    (got,), _ = run(CpuBackend(isa), PLAIN, dtype, inputs)
    (wanted,), _ = run(ReferenceBackend(), PLAIN, dtype, inputs)
    (exact,), _ = run(ReferenceBackend(), PLAIN, "bf16", inputs)
    assert (got - wanted).abs().max() <= (wanted - exact).abs().max() + 2e-5


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", ["int8", "int8h", "nf4", "int4"])
def test_a_padding_token_in_a_prompt(dtype: str, isa: str) -> None:
    """An embedding with ``padding_idx`` gives a row of zeros, and so do layer 0's keys and values."""
    plain, model = (tiny_model("llama", head_dim=32) for _ in range(2))
    for each in (plain, model):
        assert each.get_input_embeddings().padding_idx == 0
        each.get_input_embeddings().weight.data[0] = 0.0
    prompt = torch.randint(3, 97, (150,), generator=torch.Generator().manual_seed(1))
    prompt[40] = 0
    loaded = wrap(model, None, "tiny")

    def divergence(other: torch.Tensor, of: torch.Tensor) -> float:
        own = of[100:].log_softmax(-1)
        return float((own.exp() * (own - other[100:].log_softmax(-1))).sum(-1).mean())

    with torch.inference_mode():
        exact = plain(prompt[None]).logits[0]
        coded = Driver(loaded, dtype, ReferenceBackend()).step({0: prompt.tolist()})[0]
        got = Driver(loaded, dtype, CpuBackend(isa)).step({0: prompt.tolist()})[0]
    assert divergence(got, exact) <= 1.1 * divergence(coded, exact) + 1e-3
