"""Codecs: what a page loses, how many bytes it takes, and the strings that name them."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.error_bounds import HALF_EPS, HALF_TINY, error_bound, hadamard_matrix, rows_like_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbits.codecs import SCHEMES, Codec, Rounding, Side, codecs_in_use, parse_policy
from kvbits.codecs.affine import Affine
from kvbits.codecs.blocks import Blocks
from kvbits.codecs.codebook import ENTRIES, Codebook
from kvbits.codecs.float8 import Float8
from kvbits.codecs.hadamard import rotate
from kvbits.codecs.mixed import Mixed
from kvbits.codecs.nibbles import Nibbles
from kvbits.codecs.packing import pack, quads_multiple, unpack
from kvbits.codecs.raw import Raw
from kvbits.codecs.scale8 import to_scale8
from kvbits.config import ALIGNMENT, PAGE_TOKENS, LayerGeometry, ModelGeometry

CODECS = codecs_in_use()
DIMS = (64, 96, 256)
FITTING = [(name, dim) for name, (codec, _) in CODECS.items() for dim in DIMS if codec.supports(dim) is None]


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 192])
def test_rotation_is_the_hadamard_matrix_and_its_own_inverse(dim: int) -> None:
    rows = rows_like_keys(dim)
    rotated = rotate(rows)
    assert torch.allclose(rotated.double(), rows.double() @ hadamard_matrix(dim), atol=rows.abs().max() * 1e-6)
    assert torch.allclose(rotate(rotated), rows, atol=float(rows.abs().max()) * 1e-6)


def test_codebook_entries_are_those_of_least_error() -> None:
    """No entry can be moved, by two units, to lower the squared error of normal numbers."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(60_000, 64, generator=generator)
    scaled = rows / rows.abs().amax(-1, keepdim=True) * 63
    weight = rows.abs().amax(-1, keepdim=True).expand_as(rows).square()

    def loss(entries: Tensor) -> float:
        code = torch.bucketize(scaled, (entries[1:] + entries[:-1]) / 2)
        return float(((scaled - entries[code]).square() * weight).double().mean())

    for bits, entries in ENTRIES.items():
        best = torch.tensor(entries).float()
        least = loss(best)
        for i in range(2**bits // 2):
            for step in (-2.0, 2.0):  # both ends, to keep the symmetry; two units: entries are rounded to one
                moved = best.clone()
                moved[i] += step
                moved[-1 - i] -= step
                assert loss(moved) > least, (bits, i, step)


@pytest.mark.parametrize("magnitude", [1.0, 1e-2, 300.0, 1e-6, 1e-30, 0.0])
@pytest.mark.parametrize(("name", "dim"), FITTING)
def test_round_trip_stays_within_half_a_step(name: str, dim: int, magnitude: float) -> None:
    codec, side = CODECS[name]
    rows = rows_like_keys(dim, magnitude)
    error = (decode(codec, rows, side) - rows).abs()
    # 1e-6: float32 arithmetic of the decoder
    assert (error <= error_bound(codec, rows) * (1 + 1e-6) + rows.abs().max() * 1e-6).all()


def decode(codec: Codec, rows: Tensor, side: Side) -> Tensor:
    return codec.decode(codec.encode(rows, side), rows.shape[-1], side)


@pytest.mark.parametrize(("name", "dim"), FITTING)
def test_sizes_are_those_of_the_bytes(name: str, dim: int) -> None:
    codec, side = CODECS[name]
    page = codec.encode(rows_like_keys(dim), side)
    assert page.dtype == torch.uint8
    assert page.shape == (2, codec.page_bytes(dim))
    assert codec.page_bytes(dim) % ALIGNMENT == 0
    assert codec.bits_per_element(dim) == 8 * page.shape[-1] / (PAGE_TOKENS * dim)


def test_bits_per_element_of_head_size_64() -> None:
    # codes, plus 16 bits of scale (and of zero) for every 64 elements; int8: zeros of keys only; int8h: bytes
    geometry = ModelGeometry("m", (LayerGeometry(9, 3, 64, 64, 0.125),) * 2, 4096, 100)
    expected = {
        "bf16": 16,
        "int8": 8.375,
        "int8h": 8.25,
    }
    expected |= {name: int(name[3:]) + 0.5 for name in SCHEMES if re.fullmatch("int[2-7]", name)}
    expected |= dict.fromkeys(("fp8", "fp8_e4m3", "fp8_e5m2"), 8.125)
    expected |= {"nf4": 4.25, "nf3": 3.25, "nf2": 2.25}
    expected |= {
        "int4b64": 4.5,
        "int4b32": 4.75,
        "int3b32": 3.75,
        "int2b32": 2.75,
    }  # keys as int4, values with two groups a token
    # a quarter of the key channels wider, and a byte for each channel's name
    expected |= {"mix8_4": (5.625 + 4.5) / 2, "mix8_2": (4.125 + 2.5) / 2, "mix4_2": (3.125 + 2.5) / 2}
    assert set(expected) == set(SCHEMES)
    for name, bits in expected.items():
        assert parse_policy(name, 2).bits_per_element(geometry) == bits
    assert parse_policy("0:int8,1:int4", 2).bits_per_element(geometry) == (8.375 + 4.5) / 2
    assert parse_policy("int8/int4", 2).bits_per_element(geometry) == (8.5 + 4.5) / 2


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-20, 6e4])
@pytest.mark.parametrize("name", CODECS)
def test_a_constant_page_comes_back(name: str, value: float) -> None:
    codec, side = CODECS[name]
    rows = torch.full((1, PAGE_TOKENS, 64), value).bfloat16().float()
    assert ((decode(codec, rows, side) - rows).abs() <= error_bound(codec, rows) * (1 + 1e-6)).all()


@pytest.mark.parametrize("magnitude", [1e5, 1e8, 1e30, 2e36])
@pytest.mark.parametrize("name", CODECS)
def test_values_beyond_float16_saturate_and_stay_finite(name: str, magnitude: float) -> None:
    codec, side = CODECS[name]
    rows = rows_like_keys(64, magnitude)
    decoded = decode(codec, rows, side)
    assert torch.isfinite(decoded).all()
    if isinstance(codec, Raw):
        assert torch.equal(decoded, rows)
        return
    if isinstance(codec, Float8):  # its scale is float32
        assert ((decoded - rows).abs() <= error_bound(codec, rows)).all()
        return
    if isinstance(codec, Codebook):  # a token's length is at most its entries' and its center's
        assert (decoded.norm(dim=-1) <= 2 * rows.norm(dim=-1).amax()).all()
        return
    if isinstance(codec, Mixed):
        codec = Affine("", codec.low, per="channel")
    if isinstance(codec, Blocks):
        codec = Affine("", codec.bits, per="token")
    # a zero point that float16 cannot say is clipped, which widens the range that the steps must cover; within that
    # range nothing grows past half a step, and what lies outside of it shrinks to its edge
    axis = -1 if codec.per == "token" else -2
    widened = torch.cat([rows, rows.clamp(-65504, 65504)], axis)
    assert (decoded.abs() <= rows.abs() + error_bound(codec, widened) * (1 + 1e-6)).all()


def test_values_of_int8_reach_past_float16() -> None:
    # the scale is 1/127 of the largest value, so values go up to 127 * 65504
    codec, _ = CODECS["int8-value"]
    rows = rows_like_keys(64, 1e4)
    assert rows.abs().max() > 65504
    assert ((decode(codec, rows, "value") - rows).abs() <= error_bound(codec, rows)).all()


@pytest.mark.parametrize("name", ["int8", "int8h", "int6", "int5", "int4", "nf4", "mix8_4"])
def test_constant_channels_of_keys_cost_almost_nothing(name: str) -> None:
    """Biases of key projections (Qwen2) put a large constant into a few channels; the others must not pay for it."""
    codec, _ = CODECS[f"{name}-key"]
    rows = torch.randn(8, PAGE_TOKENS, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    shifted = rows.clone()
    shifted[..., 5] += 150
    shifted[..., 40] -= 90
    shifted = shifted.bfloat16().float()
    quiet = [c for c in range(64) if c not in (5, 40)]
    error, usual = ((decode(codec, x, "key") - x)[..., quiet].square().mean().sqrt() for x in (shifted, rows))
    assert error <= 1.05 * usual


class TestMixedChannels:
    CODEC = Mixed("", 8, 2)

    def test_loud_channels_are_the_finer_ones(self) -> None:
        rows = torch.randn(1, PAGE_TOKENS, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
        loud = torch.arange(0, 64, 4)
        rows[..., loud] *= 10
        error = (decode(self.CODEC, rows, "key") - rows).abs().amax((0, 1))
        reach = (rows.amax(-2) - rows.amin(-2))[0]
        steps = error / reach
        assert steps[loud].max() < 0.6 / 255
        quiet = torch.ones(64, dtype=torch.bool)
        quiet[loud] = False
        assert steps[quiet].min() > 5 / 255

    def test_a_calibrated_order_decides(self) -> None:
        rows = torch.randn(2, PAGE_TOKENS, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
        order = torch.stack([torch.arange(64), torch.arange(63, -1, -1)]).int()
        page = self.CODEC.encode(rows, "key", Rounding(order=order))
        assert torch.equal(page[:, :64].int(), order)
        steps = (self.CODEC.decode(page, 64, "key") - rows).abs().amax(1) / (rows.amax(1) - rows.amin(1))
        assert steps[0, :16].max() < 0.6 / 255 < steps[0, 16:].min()
        assert steps[1, 48:].max() < 0.6 / 255 < steps[1, :48].min()

    def test_equal_channels_keep_their_order(self) -> None:
        rows = torch.arange(PAGE_TOKENS).float().view(1, -1, 1).expand(1, PAGE_TOKENS, 64)
        assert torch.equal(self.CODEC.encode(rows, "key")[0, :64], torch.arange(64, dtype=torch.uint8))


@pytest.mark.parametrize("block", [32, 64])
def test_a_block_of_value_channels_has_parameters_of_its_own(block: int) -> None:
    codec = Blocks("", 4, block)
    rows = rows_like_keys(128)
    changed = rows.clone()
    changed[:, 5, 7] += 500.0
    before, after = decode(codec, rows, "value"), decode(codec, changed, "value")
    same = torch.ones(PAGE_TOKENS, 128, dtype=torch.bool)
    same[5, :block] = False
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before[:, ~same], after[:, ~same])


@pytest.mark.parametrize("name", [n for n in CODECS if n.startswith("int") and "b" not in n])
def test_each_group_has_parameters_of_its_own(name: str) -> None:
    codec, side = CODECS[name]
    page = codec.page_format(64, side)
    assert page is not None
    rows = rows_like_keys(64)
    changed = rows.clone()
    changed[:, 5, 7] += 500.0
    before, after = decode(codec, rows, side), decode(codec, changed, side)
    same = torch.ones(PAGE_TOKENS, 64, dtype=torch.bool)
    if page.per == "token":
        same[5] = False
    else:
        same[:, 7] = False
    assert torch.equal(before[:, same], after[:, same])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["int8h-key", "int8h-value"])
class TestDrafts:
    def test_a_draft_is_within_half_a_nibble_of_the_page(self, name: str, dim: int) -> None:
        codec, side = CODECS[name]
        assert isinstance(codec, Nibbles)
        rows = rows_like_keys(dim)
        page = codec.encode(rows, side)
        full, draft = codec.decode(page, dim, side), codec.decode_draft(page, dim, side)
        axis = -1 if codec.per == "token" else -2
        reach = rows.abs().amax(axis, keepdim=True) * 2 if codec.symmetric else rows.amax(axis) - rows.amin(axis)
        reach = reach if codec.symmetric else reach.unsqueeze(axis)
        # 7.5 of 255 or 254 steps, each at most 1/8 wider than the range asks for
        assert ((full - draft).abs() <= reach / 254 * 1.13 * 7.5 + rows.abs().max() * 1e-6).all()
        assert not torch.equal(full, draft)

    def test_a_draft_reads_the_first_bytes_only(self, name: str, dim: int) -> None:
        codec, side = CODECS[name]
        assert isinstance(codec, Nibbles)
        page = codec.encode(rows_like_keys(dim), side)
        cut = page.clone()
        cut[:, codec.draft_bytes(dim) :] = 0xFF
        assert torch.equal(codec.decode_draft(page, dim, side), codec.decode_draft(cut, dim, side))
        assert not torch.equal(codec.decode(page, dim, side), codec.decode(cut, dim, side))
        assert codec.draft_bytes(dim) <= 0.55 * codec.page_bytes(dim)


@settings(deadline=None, max_examples=100)
@given(scale=st.floats(0, 7e4, width=32))
def test_byte_scales_are_rounded_up_by_an_eighth_at_most(scale: float) -> None:
    byte, meaning = to_scale8(torch.tensor([scale]), up=True)
    assert int(byte) <= 247
    least = min(scale, 61440.0)
    assert least * (1 - HALF_EPS) - HALF_TINY <= float(meaning) <= scale * (1 + HALF_EPS) * 1.125 + 2.0**-17
    nearest = float(to_scale8(torch.tensor([scale]))[1])
    assert abs(nearest - least) <= least * (HALF_EPS + 1 / 16) + 2.0**-18 + HALF_TINY


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    groups=st.integers(1, 4),
    lanes=st.sampled_from([16, 64, 80]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_packing_loses_nothing(bits: int, groups: int, lanes: int, batch: int, seed: int) -> None:
    reduction = groups * quads_multiple(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (batch, reduction, lanes), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (batch, reduction * lanes * bits // 8)
    assert torch.equal(unpack(packed, bits, reduction, lanes), codes)


def test_packing_puts_bits_where_the_format_says() -> None:
    # reduced element 4 q + i of a lane: byte [q // 2, lane, i], low half for even q
    codes = torch.zeros(8, 3, dtype=torch.uint8)
    codes[2, 1] = 5
    codes[6, 1] = 9
    expected = torch.zeros(3, 4, dtype=torch.uint8)
    expected[1, 2] = 9 << 4 | 5
    assert torch.equal(pack(codes, 4), expected.flatten())


@pytest.mark.parametrize("name", CODECS)
def test_head_sizes_that_do_not_fit_are_named(name: str) -> None:
    codec, _ = CODECS[name]
    assert codec.supports(64) is None
    assert "head size 24" in str(codec.supports(24))
