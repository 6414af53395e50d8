"""docs/formats.md read literally: pages taken apart with numpy alone mean what the codecs say, and are as long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvbits.codecs import SCHEMES, parse_policy

Bytes = NDArray[np.uint8]
Matrix = NDArray[np.float64]

TOKENS = 64
BITS = {"int8": 8.375, "int8h": 8.25, "fp8": 8.125, "fp8_e5m2": 8.125, "bf16": 16, "mix8_4": 5.06, "mix8_2": 3.31,
        "mix4_2": 2.81, "int6": 6.5, "int5": 5.5, "int4": 4.5, "int3": 3.5, "int2": 2.5, "nf4": 4.25, "nf3": 3.25,
        "nf2": 2.25, "int4b64": 4.5, "int4b32": 4.75, "int3b32": 3.75, "int2b32": 2.75}  # fmt: skip
PLANES = {8: [8], 6: [4, 2], 5: [4, 1], 4: [4], 3: [2, 1], 2: [2]}
ENTRIES = {4: [3, 9, 15, 21, 28, 37, 47, 60], 3: [6, 18, 32, 52], 2: [11, 37]}
MIXED_VALUES = {"mix8_4": "int4", "mix8_2": "int2", "mix4_2": "int2"}


def codes_of(page: Bytes, bits: int, reduction: int, lanes: int) -> NDArray[np.int64]:
    """ "How codes lie in bytes"."""
    codes = np.zeros((reduction, lanes), np.int64)
    low = start = 0
    for w in PLANES[bits]:
        for g in range(reduction * w // 32):
            group = page[start + 4 * g * lanes : start + 4 * (g + 1) * lanes].reshape(lanes, 4).astype(np.int64)
            for j in range(8 // w):
                first = 4 * ((8 // w) * g + j)
                codes[first : first + 4] |= ((group >> (w * j)) & ((1 << w) - 1)).T << low
        start += reduction * lanes * w // 8
        low += w
    return codes


def halves(page: Bytes, start: int, count: int) -> Matrix:
    return np.frombuffer(page[start : start + 2 * count].tobytes(), "<f2").astype(np.float64)


def short_scales(page: Bytes, start: int, count: int) -> Matrix:
    return np.frombuffer((page[start : start + count].astype("<u2") << 7).tobytes(), "<f2").astype(np.float64)


def padded(size: int) -> int:
    return -(-size // 64) * 64


def hadamard(size: int) -> Matrix:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def integers(page: Bytes, bits: int, dim: int, key: bool) -> Matrix:
    size, n = TOKENS * dim * bits // 8, dim if key else TOKENS
    codes = codes_of(page, bits, *((dim, TOKENS) if key else (TOKENS, dim)))
    scale, zero = halves(page, size, n), halves(page, size + 2 * n, n)
    return codes.T * scale + zero if key else codes * scale[:, None] + zero[:, None]


def read(name: str, page: Bytes, dim: int, key: bool) -> Matrix:
    """What a page means, ``[64, dim]``."""
    shape = (dim, TOKENS) if key else (TOKENS, dim)

    def by_token(matrix: NDArray[np.generic]) -> NDArray[np.generic]:
        return matrix.T if key else matrix

    if name == "bf16":
        pairs = np.frombuffer(page.tobytes(), "<u2").reshape(shape[0] // 2, shape[1], 2)
        whole = pairs.transpose(0, 2, 1).reshape(shape).astype(np.uint32) << 16
        return by_token(whole.view(np.float32)).astype(np.float64)
    if name == "int8" and not key:
        codes = codes_of(page, 8, *shape)
        return np.where(codes > 127, codes - 256, codes) * halves(page, TOKENS * dim, TOKENS)[:, None]
    if name == "int8h":
        plane, n = TOKENS * dim // 2, dim if key else TOKENS
        scale = short_scales(page, plane, n)
        zero = halves(page, plane + n, n) if key else -128 * scale
        low = page[padded(plane + (3 * n if key else n)) :]
        codes = by_token(16 * codes_of(page, 4, *shape) + codes_of(low, 4, *shape))
        return codes * scale + zero if key else codes * scale[:, None] + zero[:, None]
    if name.startswith("fp8"):
        codes = by_token(codes_of(page, 8, *shape)).astype(np.int64)
        mantissa = 2 if name.endswith("e5m2") else 3
        bias = 15 if mantissa == 2 else 7
        fraction, exponent = codes % 2**mantissa, (codes % 128) >> mantissa
        small, usual = (
            fraction * 2.0 ** (1 - bias - mantissa),
            (2**mantissa + fraction) * 2.0 ** (exponent - bias - mantissa),
        )
        floats = np.where(exponent == 0, small, usual) * np.where(codes > 127, -1, 1)
        return floats * np.frombuffer(page[TOKENS * dim : TOKENS * dim + 4].tobytes(), "<f4")[0]
    if name.startswith("nf"):
        bits = int(name[2])
        size = TOKENS * dim * bits // 8
        entries = np.array([-e for e in reversed(ENTRIES[bits])] + ENTRIES[bits], float)
        rows = entries[by_token(codes_of(page, bits, *shape)).astype(np.int64)]
        rows = rows * short_scales(page, size, TOKENS)[:, None] @ hadamard(dim)
        return rows + halves(page, size + TOKENS, dim) if key else rows
    if name.startswith("mix") and key:
        order, start, found = page[:dim].astype(np.int64), padded(dim), []
        for bits, channels in ((int(name[3]), dim // 4), (int(name[5]), dim - dim // 4)):
            found.append(integers(page[start:], bits, channels, key))
            start += padded(TOKENS * channels * bits // 8 + 4 * channels)
        rows = np.empty((TOKENS, dim))
        rows[:, order] = np.concatenate(found, axis=1)
        return rows
    if "b" in name[4:] and not key:
        block = int(name[5:])
        length = len(page) // (dim // block)
        blocks = [integers(page[i * length :], int(name[3]), block, key) for i in range(dim // block)]
        return np.concatenate(blocks, axis=1)
    return integers(page, int(MIXED_VALUES.get(name, name)[3]), dim, key)


def test_every_dtype_is_described() -> None:
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    assert {*BITS, "fp8_e4m3"} == set(SCHEMES)
    assert not [name for name in SCHEMES if f"`{name}`" not in page]


@pytest.mark.parametrize("name", BITS)
def test_the_page_describes_the_bytes(name: str) -> None:
    dim = 64
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(TOKENS, dim, generator=generator) * torch.linspace(0.2, 3, dim) + torch.linspace(-1, 2, dim)
    (scheme,) = parse_policy(name, 1).layers
    length = 0
    for codec, side in ((scheme.key, "key"), (scheme.value, "value")):
        page = codec.encode(rows, side)  # type: ignore[arg-type]
        expected = codec.decode(page, dim, side).double().numpy()  # type: ignore[arg-type]
        np.testing.assert_allclose(read(name, page.numpy(), dim, side == "key"), expected, rtol=1e-5, atol=1e-5)
        length += page.numel()
    assert length % 64 == 0
    assert 8 * length / (2 * TOKENS * dim) == pytest.approx(BITS[name], abs=5e-3)
