"""Formats of weights against the gguf package, and the products with them against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from helpers.weight_bytes import HALVES, random_rows
from torch import Tensor

from kvbits.kernels.cpu import available_isas
from kvbits.kernels.products import PackedWeight, Products
from kvbits.weights import FORMATS, ROUNDED, WeightFormat
from kvbits.weights.inputs import product, round_inputs

CODED = [made for made in FORMATS.values() if made.rounds_inputs]
MIXED = pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
IN_BITS = pytest.mark.parametrize("weight_format", CODED, ids=[made.name for made in CODED])
ISAS = pytest.mark.parametrize("isa", available_isas())


def unpacked(weight_format: WeightFormat, rows: np.ndarray) -> np.ndarray:
    """By the gguf package; our own formats by their definition."""
    if weight_format.native_id >= 1000:
        blocks = rows.reshape(len(rows), -1, weight_format.block_bytes)
        scale, second = (blocks[:, :, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
        codes = blocks[:, :, 4:]
        if codes.shape[2] == 16:
            codes = np.concatenate([codes & 15, codes >> 4], axis=2)
        wide = codes.astype(np.float32)
        values = scale * wide + second if weight_format.name == "int8" else scale * (wide - second)
        return np.asarray(values.reshape(len(rows), -1))
    found: np.ndarray = dequantize(rows, GGMLQuantizationType(weight_format.native_id))
    return found


def packed(weight_format: WeightFormat, rows: np.ndarray, in_features: int, bias: Tensor | None = None) -> PackedWeight:
    weight = PackedWeight.empty(len(rows), in_features, weight_format, bias)
    weight.fill(rows)
    return weight


@MIXED
def test_decode_is_that_of_the_gguf_package(weight_format: WeightFormat) -> None:
    rows = random_rows(weight_format, 37, 6)
    expected = unpacked(weight_format, rows)
    assert np.array_equal(weight_format.decode(torch.from_numpy(rows)).numpy(), expected)
    assert weight_format.block_bytes * 8 / weight_format.block == weight_format.bits


@MIXED
@pytest.mark.parametrize("out", [1, 31, 32, 70])
def test_a_packed_weight_is_what_the_bytes_say(weight_format: WeightFormat, out: int) -> None:
    """Bit for bit, in any order of rows, filled piece by piece."""
    rows = random_rows(weight_format, out, 3)
    order = np.random.default_rng(1).permutation(out)
    weight = PackedWeight.empty(out, 3 * weight_format.block, weight_format)
    for first in range(weight.strips):
        weight.fill(rows, order, first, first + 1)
    expected = unpacked(weight_format, rows)[order]
    wanted = torch.tensor([out - 1, 0, out // 2])
    assert np.array_equal(weight.unpack(wanted).numpy(), expected[wanted.numpy()])
    assert weight.bytes <= 1.03 * 32 * weight.strips * rows.shape[1]


@pytest.mark.parametrize(("weights", "rival"), [("int8", "Q8_0"), ("int4", "Q4_1"), ("int4", "Q4_0")])
def test_rounding_loses_less_than_the_gguf_package(weights: str, rival: str) -> None:
    """In squared error, on average over outputs of any size."""
    weight_format, kind = ROUNDED[weights], GGMLQuantizationType[rival]
    weight = torch.randn(50, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 50)[:, None]
    weight[3], weight[4, :32] = 0, 0
    found = weight_format.decode(weight_format.encode(weight))
    theirs = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
    own, other = ((x - weight).square().sum(dim=1) for x in (found, theirs))
    assert (found[3] == 0).all()
    assert (own / (other + 1e-30))[5:].mean() < 0.98
    assert own.sum() < other.sum()


@ISAS
@pytest.mark.parametrize("rows", [5, 23])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_inputs_that_fill_no_group(weights: str, rows: int, isa: str) -> None:
    weight = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    x = torch.randn(rows, 50, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    products = Products(isa)
    found = products.apply(products.pack(weight, None, ROUNDED[weights]), x)
    assert_close(found, exact_product(x, ROUNDED[weights].encode(weight).numpy(), ROUNDED[weights], isa))


def test_inputs_are_rounded_by_half_a_step_at_most() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(7, 96, generator=generator) * torch.logspace(-3, 3, 7)[:, None]).to(torch.bfloat16)
    step = x.double().unflatten(1, (6, 16)).abs().amax(dim=-1, keepdim=True) / 127
    error = (round_inputs(x) - x.double()).abs().unflatten(1, (6, 16))
    # x * (127 / largest) is rounded twice in float32: up to 127 * 2^-23 of a step, which may move a tie
    assert (error <= step * (0.5 + 2e-5)).all()


def assert_close(found: Tensor, exact: Tensor) -> None:
    """Up to the rounding of the result to bfloat16, and the float32 sum's."""
    bound = exact.abs() / 256 + exact.abs().amax() * 1e-4 + 1e-30
    assert ((found.double() - exact).abs() <= bound).all(), (found.double() - exact).abs().max()


def exact_product(x: Tensor, stored: np.ndarray, weight_format: WeightFormat, isa: str) -> Tensor:
    """In float64, of the inputs as the kernels take them: in 8 bits or, on tiles, as they are."""
    if isa.startswith("amx"):
        return x.double() @ torch.from_numpy(unpacked(weight_format, stored)).double().T[: x.shape[1]]
    return product(x, torch.from_numpy(stored), weight_format)


@ISAS
@IN_BITS
@pytest.mark.parametrize("rows", [1, 3, 8, 21, 70])
def test_products_against_float64(weight_format: WeightFormat, rows: int, isa: str) -> None:
    stored = random_rows(weight_format, 75, 2, rows)
    bias = torch.randn(75)
    x = torch.randn(rows, 2 * weight_format.block, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
    x[0, :32] = 0
    weight = packed(weight_format, stored, x.shape[1], bias)
    found = Products(isa).apply(weight, x)
    assert_close(found, exact_product(x, stored, weight_format, isa) + bias.double())


@IN_BITS
@pytest.mark.parametrize("shape", [(64, 1), (45, 2), (7, 3)])
def test_every_instruction_set_gives_the_same_bits(weight_format: WeightFormat, shape: tuple[int, int]) -> None:
    """Tiles sum in another order, of other inputs: they are compared with one another."""
    out, blocks = shape
    weight = packed(weight_format, random_rows(weight_format, out, blocks), blocks * weight_format.block)
    x = torch.randn(19, weight.in_features, generator=torch.Generator().manual_seed(out)).to(torch.bfloat16)
    for tiles in (False, True):
        found = [Products(isa).apply(weight, x) for isa in available_isas() if isa.startswith("amx") == tiles]
        for other in found[1:]:
            assert torch.equal(found[0], other)


@ISAS
@MIXED
def test_a_row_is_the_same_alone_and_among_others(weight_format: WeightFormat, isa: str) -> None:
    weight = packed(weight_format, random_rows(weight_format, 70, 2), 2 * weight_format.block)
    x = torch.randn(99, weight.in_features, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    products = Products(isa, threads=2)
    whole = products.apply(weight, x)
    for rows in (*range(1, 34), 64, 98):
        assert torch.equal(products.apply(weight, x[:rows]), whole[:rows]), rows
    for first in (1, 13, 40):
        assert torch.equal(products.apply(weight, x[first : first + 24]), whole[first : first + 24]), first


@ISAS
@IN_BITS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_no_number_stays_one_and_alone(weight_format: WeightFormat, isa: str, bad: float) -> None:
    weight = packed(weight_format, random_rows(weight_format, 33, 1), weight_format.block)
    x = torch.randn(9, weight.in_features).to(torch.bfloat16)
    products = Products(isa)
    plain = products.apply(weight, x)
    x[4, 17] = bad
    found = products.apply(weight, x)
    assert not found[4].isfinite().any()
    assert found[4].isnan().all() or isa.startswith("amx")  # there the inputs are not rounded: infinite sums are right
    assert torch.equal(found[:4], plain[:4])
    assert torch.equal(found[5:], plain[5:])


@ISAS
@IN_BITS
def test_the_largest_codes_do_not_overflow(weight_format: WeightFormat, isa: str) -> None:
    """All bits set or none, inputs at both ends."""
    rows = random_rows(weight_format, 64, 1)
    halves = [rows[:, at : at + 2].copy() for at in HALVES.get(weight_format.name, (0,))]
    for fill in (0, 255):
        rows[:] = fill
        for at, half in zip(HALVES.get(weight_format.name, (0,)), halves, strict=True):
            rows[:, at : at + 2] = half
        x = torch.ones(4, weight_format.block).to(torch.bfloat16)
        x[1], x[2, ::2] = -1, -1
        found = Products(isa).apply(packed(weight_format, rows, weight_format.block), x)
        assert_close(found, product(x, torch.from_numpy(rows), weight_format))
