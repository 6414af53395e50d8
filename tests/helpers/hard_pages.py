"""Pages at the edges of what a codec can say, and how a backend seals them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from helpers.driver import Frames
from kvbits.codecs import LayerRounding
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels import Backend, BatchLayout

OUTLIERS = (1e-40, 1e4, -1e4, 7e4, 1e20, -1e20, 1e23, 1e30, -1e30, 3e38, -3e38)
SCALES = (1e-2, 1e-4, 1e-6, 3e-7, 1e-8, 1e-20, 1e-36, 1e-39, 2e4, 1e6, 1e20, 1e30, 5e37)


def hard_pages(dim: int, heads: int = 1) -> dict[str, Tensor]:
    """Finite pages ``float32 [64, heads, dim]`` by what is hard about them."""
    g = torch.Generator().manual_seed(0)

    def plain() -> Tensor:
        return torch.randn(64, heads, dim, generator=g)

    def page(**rows: float) -> Tensor:
        x = plain()
        for name, number in rows.items():
            x[int(name.removeprefix("row"))] = number
        return x

    ordered = plain().abs()
    ordered[3], ordered[5] = 0.0, -0.0
    ordered[9, :, ::2], ordered[9, :, 1::2] = 0.0, -0.0
    unlike = torch.zeros(64, heads, dim)
    unlike[::2], unlike[:, :, ::3] = -0.0, -0.0
    channels = plain()
    channels[:, :, 5], channels[:, :, 6], channels[:, :, 7] = 0.0, -0.0, 3.0
    found = {
        "a zero row": page(row7=0.0),
        "a row of minus zeros": page(row7=-0.0),
        "zeros": torch.zeros(64, heads, dim),
        "minus zeros": -torch.zeros(64, heads, dim),
        "zeros of both signs": unlike,
        "the least is a zero": ordered,
        "the largest is a zero": -ordered,
        "constant channels": channels,
        "equal rows": plain()[:1].expand(64, -1, -1).clone(),
        "equal elements": torch.full((64, heads, dim), 0.37),
        "equal negative elements": torch.full((64, heads, dim), -3.7),
        "half steps": torch.randint(-8, 9, (64, heads, dim), generator=g) * 0.5,
    }
    found |= {f"all times {scale:g}": plain() * scale for scale in SCALES}
    for outlier in OUTLIERS:
        x = page(row20=outlier)
        x[9, 0, 3] = outlier
        found[f"outliers of {outlier:g}"] = x
        x = torch.zeros(64, heads, dim)
        x[30, :, 9] = outlier
        found[f"nothing but {outlier:g}"] = x
    both = plain()
    both[9, 0, 3], both[10, 0, 3], both[11, -1, 4], both[11, -1, 5] = 3e38, -3e38, 3e38, -3e38
    return found | {"outliers of both signs": both}


def broken_pages(dim: int, heads: int = 1) -> dict[str, Tensor]:
    """Pages ``float32 [64, heads, dim]`` with elements that are no numbers, all in row 9, channel 3 and around."""
    g = torch.Generator().manual_seed(0)
    found = {}
    for number in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(64, heads, dim, generator=g)
        x[9, :, 3] = number
        found[f"one {number}"] = x
        found[f"only {number}"] = torch.full((64, heads, dim), number)
    x = torch.randn(64, heads, dim, generator=g)
    x[0, :, 0], x[9, :, 3], x[63, :, -1], x[9, :, 4] = torch.nan, torch.inf, -torch.inf, 3e38
    return found | {"several": x}


def sealed(
    backend: Backend, dtype: str, pages: dict[str, Tensor], rounding: LayerRounding | None = None
) -> tuple[Tensor, Tensor]:
    """Key pages and value pages ``uint8 [pages, heads, bytes]`` of the same elements."""
    heads, dim = next(iter(pages.values())).shape[1:]
    layer = LayerGeometry(heads, heads, dim, dim, dim**-0.5, window=1)  # what is attended does not matter here
    rows = torch.cat(list(pages.values()))
    frames = Frames(ModelGeometry("test", (layer, layer), 8192, 16), dtype, len(pages) + 8)
    view = replace(frames.pool.layers[1], rounding=rounding)
    for page in rows.split(64 * 8):
        backend.forward(view, BatchLayout.of([frames.slice(0, len(page))]), torch.zeros_like(page), page, page, None)
    place = view.sealed
    size = place.scheme.layer_bytes(layer)
    blocks = frames.page_bytes(0)[:, place.offset : place.offset + size].unflatten(-1, (heads, -1))
    at = place.scheme.key.page_bytes(dim)
    return blocks[..., :at], blocks[..., at : at + place.scheme.value.page_bytes(dim)]


def expected(dtype: str, pages: dict[str, Tensor], rounding: LayerRounding | None = None) -> tuple[Tensor, Tensor]:
    """The same by the codecs themselves."""
    from kvbits.codecs import SCHEMES

    scheme, rounding = SCHEMES[dtype], rounding or LayerRounding()
    rows = torch.stack(list(pages.values())).bfloat16().float().transpose(1, 2)
    return scheme.key.encode(rows, "key", rounding.key), scheme.value.encode(rows, "value", rounding.value)


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], names: list[str]) -> None:
    """Compare byte by byte; names the pages that differ."""
    for side, a, b in zip(("key", "value"), got, wanted, strict=True):
        differing = [name for name, x, y in zip(names, a, b, strict=True) if not torch.equal(x, y)]
        assert not differing, (side, differing)
