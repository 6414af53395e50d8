"""Which compiled kernel a layer needs: its formats, head size and number of query rows, as the kernel's constants."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kvbits.codecs import Codec, Scheme, Side
from kvbits.config import LayerGeometry, align

RAW, INT8, INT4, INT2, NF4 = 16, 8, 4, 2, 104
DIMS = (64, 128, 256)
MAX_ROWS = 16
WARPS, STAGES = 4, 2


@dataclass(frozen=True)
class Variant:
    """Constants of ``decode.cu``; ``tiles``: query rows in eights."""

    keys: int
    values: int
    dim: int
    tiles: int
    softcap: bool

    @property
    def rows(self) -> int:
        return 8 * self.tiles

    @property
    def blocks_at_once(self) -> int:
        """Blocks of a multiprocessor that the registers must suffice for."""
        return blocks_at_once(self.dim, self.rows)

    @property
    def defines(self) -> tuple[str, ...]:
        sizes = {"KEYS": self.keys, "VALUES": self.values, "DIM": self.dim, "TILES": self.tiles}
        sizes |= {"SOFTCAP": int(self.softcap), "BLOCKS_AT_ONCE": self.blocks_at_once}
        return tuple(f"{name}={value}" for name, value in sizes.items())

    @property
    def together(self) -> bool:
        """Whether an own page's sums are added to those of the sealed pages of its item: rotated ones cannot be."""
        return self.values != NF4

    @property
    def param_bytes(self) -> int:
        keys = {RAW: 0, NF4: 64 + 2 * self.dim}.get(self.keys, 4 * self.dim)
        values = {RAW: 0, NF4: 64, INT8: 128}.get(self.values, 256)
        return align(keys + values) if keys + values else 0

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, as the kernel lays it out."""
        operands = self.dim // 32 * self.tiles * 32 * 16
        small = 4 * (self.rows * (1 + 2 + WARPS) + 4)
        return (
            4 * self.rows * self.dim
            + operands * (1 + (self.keys == NF4) + (self.together and self.keys != RAW))
            + WARPS * STAGES * self.param_bytes
            + small
        )


def blocks_at_once(dim: int, rows: int) -> int:
    """Blocks of a multiprocessor, for a head size and query rows of a tile."""
    return 3 if dim * -(-rows // 8) <= 128 else 2


def together(scheme: Scheme, layer: LayerGeometry) -> bool:
    """:attr:`Variant.together` of a layer that has kernels."""
    return kind_of(scheme.value, layer.value_dim, "value") != NF4


def kind_of(codec: Codec, dim: int, side: Side) -> int | None:
    """The kernel's name for a format, ``None`` where it has none."""
    page = codec.page_format(dim, side)
    if page is None:
        return None
    if page.kind == "raw":
        return RAW
    if page.kind == "affine":
        symmetric = side == "value" and page.bits == 8
        per = "channel" if side == "key" else "token"
        return page.bits if page.bits in (8, 4, 2) and page.per == per and page.symmetric == symmetric else None
    if page.kind == "codebook" and page.bits == 4 and page.centered == (side == "key") and page.rotate == dim:
        return NF4
    return None


@lru_cache(maxsize=256)
def variant_of(scheme: Scheme, layer: LayerGeometry, rows: int) -> Variant | str:
    """The kernel for ``rows`` query rows of a KV head, or the reason why there is none."""
    dim = layer.key_dim
    if dim not in DIMS or layer.value_dim != dim:
        return (
            f"head sizes {dim} and {layer.value_dim}; they have {', '.join(map(str, DIMS))} for keys and values alike"
        )
    if rows > MAX_ROWS:
        return f"{rows} query heads of a KV head; they have up to {MAX_ROWS}"
    keys, values = kind_of(scheme.key, dim, "key"), kind_of(scheme.value, dim, "value")
    if keys is None or values is None:
        codec = scheme.value if keys is not None else scheme.key
        return f"{'keys' if keys is None else 'values'} coded as '{codec.name}'; they have bf16, int8, int4, int2, nf4"
    return Variant(keys, values, dim, -(-rows // 8), layer.softcap is not None)
