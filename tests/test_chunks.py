"""Pages outside a pool: the native coder against the codecs in torch, and chunks of another engine's cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from kvbits.codecs import SCHEMES, Policy, Rounding, codecs_in_use, parse_policy
from kvbits.codecs.base import LayerRounding
from kvbits.errors import CacheError, UnsupportedError
from kvbits.kernels.chunks import HEADER_BYTES, ChunkCoder
from kvbits.kernels.coder import PageCoder
from kvbits.kernels.cpu import available_isas

HEADS, DIM = 3, 64


def rows(pages: int, dim: int = DIM, seed: int = 0) -> Tensor:
    """``bfloat16 [pages * 64, heads, dim]``, not contiguous: a part of wider rows, channels of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(pages * 64, HEADS, 2 * dim, generator=generator) * torch.rand(2 * dim, generator=generator) * 3
    return wide.bfloat16()[..., dim // 2 : dim // 2 + dim]


@pytest.mark.parametrize("name", codecs_in_use())
@pytest.mark.parametrize("isa", available_isas())
def test_bytes_and_numbers_are_the_codecs_own(name: str, isa: str) -> None:
    codec, side = codecs_in_use()[name]
    x = rows(3, DIM)
    pages = torch.full((3, HEADS, codec.page_bytes(DIM)), 0xFF, dtype=torch.uint8)
    coder = PageCoder(isa)
    coder.encode(codec, side, x, pages)
    whole = x.unflatten(0, (3, 64)).transpose(1, 2).float()
    assert torch.equal(pages, codec.encode(whole, side))
    back = torch.full_like(x, torch.nan)
    coder.decode(codec, side, pages, back)
    expected = codec.decode(pages, DIM, side).transpose(1, 2).flatten(0, 1)
    assert torch.equal(back, expected.bfloat16())


def test_what_is_no_number_comes_back_as_none() -> None:
    x = rows(1)
    x[5, 1, 7] = torch.inf
    codec = SCHEMES["int4"].key
    pages, back = torch.zeros(1, HEADS, codec.page_bytes(DIM), dtype=torch.uint8), torch.zeros_like(x)
    coder = PageCoder()
    coder.encode(codec, "key", x, pages)
    coder.decode(codec, "key", pages, back)
    assert back[:, 1, 7].isnan().all()
    assert back.isfinite().sum() == back.numel() - 64


def chunk(policy: Policy, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, len(policy.layers), tokens, HEADS * DIM, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 64, 200, 256])
@pytest.mark.parametrize("text", ["int4", "0:int8,1:int4/int8,2:nf4"])
def test_a_chunk_comes_back_as_its_pages_say(text: str, tokens: int, dtype: torch.dtype) -> None:
    """Whole pages through the codecs of their layers, the tokens beyond them untouched."""
    policy = parse_policy(text, 3)
    x, coder = chunk(policy, tokens, dtype), ChunkCoder(policy, HEADS, DIM)
    data = torch.full((coder.size(tokens) + 100,), 0xAB, dtype=torch.uint8)
    assert coder.encode([coder.heads(x)], "m", data) == coder.size(tokens)
    assert (data[-100:] == 0xAB).all()
    back = torch.full_like(x, torch.nan)
    coder.decode(data, "m", [coder.heads(back)])
    full = tokens // 64 * 64
    assert torch.equal(back[:, :, full:], x[:, :, full:])
    for index, scheme in enumerate(policy.layers):
        for number, (codec, side) in enumerate(((scheme.key, "key"), (scheme.value, "value"))):
            pages = x[number, index, :full].bfloat16().float().unflatten(-1, (HEADS, DIM)).unflatten(0, (-1, 64))
            coded = codec.decode(codec.encode(pages.transpose(1, 2), side), DIM, side)
            expected = coded.transpose(1, 2).flatten(0, 1).flatten(-2).bfloat16().to(dtype)
            assert torch.equal(back[number, index, :full], expected)


def test_calibrated_rounding_is_kept() -> None:
    """Feedback differs by head and layer; the bytes are those of the codec with it."""
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(HEADS, DIM, DIM, generator=generator).triu(1) * 0.05 for _ in range(2)]
    rounding = tuple(LayerRounding(Rounding(feedback=t), Rounding()) for t in tables)
    policy = Policy("calibrated-x", parse_policy("int4", 2).layers, rounding=rounding)
    coder, x = ChunkCoder(policy, HEADS, DIM), chunk(policy, 128)
    data = torch.zeros(coder.size(128), dtype=torch.uint8)
    coder.encode([coder.heads(x)], "m", data)
    key = policy.layers[0].key
    pages = x[0, 1].float().unflatten(-1, (HEADS, DIM)).unflatten(0, (-1, 64)).transpose(1, 2)
    expected = key.encode(pages, "key", rounding[1].key)
    assert not torch.equal(expected, key.encode(pages, "key"))
    start = HEADER_BYTES + 2 * HEADS * (key.page_bytes(DIM) + policy.layers[0].value.page_bytes(DIM))
    assert torch.equal(data[start : start + expected.numel()].view_as(expected), expected)


class TestMismatch:
    """What another model, policy, shape or dtype wrote is refused, and the difference named."""

    def data(self, tokens: int = 128) -> tuple[ChunkCoder, Tensor]:
        policy = parse_policy("int4", 2)
        coder = ChunkCoder(policy, HEADS, DIM)
        data = torch.zeros(coder.size(tokens), dtype=torch.uint8)
        coder.encode([coder.heads(chunk(policy, tokens))], "m", data)
        return coder, data

    def refuse(self, coder: ChunkCoder, data: Tensor, says: str, model: str = "m", **changes: object) -> None:
        shape = {"layers": 2, "tokens": 128, "dtype": torch.bfloat16, **changes}
        target = torch.zeros(2, shape["layers"], shape["tokens"], HEADS * DIM, dtype=shape["dtype"])
        with pytest.raises(CacheError, match=says):
            coder.decode(data, model, [coder.heads(target)])
        assert not target.any()

    def test_each_difference(self) -> None:
        coder, data = self.data()
        self.refuse(coder, data, "model 'm' instead of 'other'", model="other")
        self.refuse(coder, data, "tokens 128 instead of 64", tokens=64)
        self.refuse(coder, data, "dtype 'bfloat16' instead of 'float16'", dtype=torch.float16)
        self.refuse(coder, data[:-1], "too few")
        other = ChunkCoder(parse_policy("0:int4,1:int3", 2), HEADS, DIM)
        self.refuse(other, data, "policy 'int4' instead of '0:int4,1:int3'")

    def test_a_bit_anywhere(self) -> None:
        """In the mark, the header's text, what pads it, the checksum, pages, and tokens beyond the last page."""
        coder, data = self.data(200)
        places = [*range(0, HEADER_BYTES, 7), *range(HEADER_BYTES - 5, HEADER_BYTES + 2)]
        for at in (*places, *range(HEADER_BYTES, len(data), 1201), len(data) - 1):
            for bit in (0, 5, 7):
                data[at] ^= 1 << bit
                self.refuse(coder, data, "mark|damaged|another kind", tokens=200)
                data[at] ^= 1 << bit
        coder.decode(data, "m", [coder.heads(torch.zeros(2, 2, 200, HEADS * DIM, dtype=torch.bfloat16))])

    def test_any_length(self) -> None:
        coder, data = self.data()
        for length in (0, 1, 13, 14, 100, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, len(data) - 1):
            self.refuse(coder, data[:length], "mark|damaged|another kind|too few")

    @pytest.mark.parametrize("text", [b"", b"[" * 1000, b"null", b'"\xff"', b"{}", b"NaN", b"9" * 900])
    def test_headers_of_others(self, text: bytes) -> None:
        coder, data = self.data()
        header = (b"kvbits-chunk\x00" + text).ljust(HEADER_BYTES - 4, b"\x00")[: HEADER_BYTES - 4]
        data[: HEADER_BYTES - 4] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        self.refuse(coder, data, "damaged|another kind")

    def test_shapes_that_are_none(self) -> None:
        coder, data = self.data()
        for shape in ((1, 2, 128, HEADS * DIM), (2, 3, 128, HEADS * DIM), (2, 2, 128, 5), (2, 2, HEADS * DIM)):
            with pytest.raises(UnsupportedError, match="shape"):
                coder.heads(torch.zeros(shape))
        with pytest.raises(UnsupportedError, match="float32"):
            coder.encode([coder.heads(torch.zeros(2, 2, 128, HEADS * DIM))], "m", data)
        with pytest.raises(UnsupportedError, match="first page"):
            ChunkCoder(parse_policy("int4+sink:int8", 2), HEADS, DIM)
        with pytest.raises(UnsupportedError, match="head size 40"):
            ChunkCoder(parse_policy("int4", 2), HEADS, 40)


def test_threads_share_a_coder() -> None:
    """Chunks that are coded at once are those that are coded one after another."""
    policy = parse_policy("0:int4,1:nf4", 2)
    coder, sizes = ChunkCoder(policy, HEADS, DIM), [64 + 40 * i for i in range(12)]

    def trip(tokens: int) -> tuple[Tensor, Tensor]:
        data, back = torch.zeros(coder.size(tokens), dtype=torch.uint8), torch.empty_like(chunk(policy, tokens))
        coder.encode([coder.heads(chunk(policy, tokens))], "m", data)
        coder.decode(data, "m", [coder.heads(back)])
        return data, back

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(trip, sizes))
    for pair, tokens in zip(found, sizes, strict=True):
        assert all(map(torch.equal, pair, trip(tokens)))


def test_int4_is_a_third_of_the_bytes() -> None:
    """A chunk of LMCache's usual 256 tokens of a model with 8 heads of 128: header and parameters counted."""
    coder = ChunkCoder(parse_policy("int4", 32), 8, 128)
    assert 2 * 32 * 256 * 8 * 128 * 2 / coder.size(256) >= 3.4
