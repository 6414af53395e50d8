"""What the kernels know at compile time: how a page is coded and what a layer looks like, as plain numbers.

Every derived size is a field and not a property: Triton tells compiled kernels apart by what such an object prints.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbits.codecs import Codec, PageFormat, Scheme, Side
from kvbits.config import PAGE_TOKENS, LayerGeometry, align

MAX_DIM = 256
"""The largest head size whose page fits the registers of one program."""

KINDS = ("raw", "affine", "nibbles", "float8", "codebook", "mixed", "blocks")
"""What ``dequantize`` and ``seal_pages`` know (:class:`kvbits.codecs.PageFormat`); sizes are no matter of theirs."""


@dataclass(frozen=True)
class Format:
    """One head's page of keys (``[dim, 64]``: channels are rows) or values (``[64, dim]``: tokens are rows).

    ``row_block``, ``lane_block``: the sizes padded to powers of two. ``params_at``: byte of the first parameter;
    ``per_row``: parameters belong to rows and not to lanes. ``second_at``: byte of the second part of a page (low
    nibbles; a mixed page's narrow channels, whose wide ones are the ``first`` ones stored, from byte ``first_at``).
    ``stride``: lanes that lie side by side. ``rotate``: channels that are rotated together, 0 for none. ``inner``: the
    format of each block of channels, where values have several.
    """

    kind: str
    key: bool
    dim: int
    dim_block: int
    rows: int
    lanes: int
    row_block: int
    lane_block: int
    stride: int
    bytes: int
    bits: int
    params_at: int
    per_row: bool = False
    symmetric: bool = False
    centered: bool = False
    rotate: int = 0
    rotate_steps: int = 0
    low_bits: int = 0
    first: int = 0
    first_at: int = 0
    second_at: int = 0
    draft: bool = False
    inner: Format | None = None


@dataclass(frozen=True)
class Block:
    """One head's block of a layer in a frame: its keys, and its values ``values_at`` bytes later."""

    keys: Format
    values: Format
    bytes: int
    values_at: int


@dataclass(frozen=True)
class Shape:
    """A layer. ``window`` and ``softcap`` are 0 where there is none; ``dim_block`` are powers of two."""

    kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    key_block: int
    value_block: int
    scale: float
    window: int
    softcap: float
    sinks: bool
    rotated_keys: bool
    key_rotate: int
    key_rotate_steps: int


def format_of(codec: Codec, dim: int, side: Side, draft: bool = False) -> Format | None:
    """``None`` for a codec that these kernels do not know."""
    page = codec.page_format(dim, side)
    if page is None or page.kind not in KINDS:
        return None
    return _format(page, dim, side, codec.page_bytes(dim), draft)


def _format(page: PageFormat, dim: int, side: Side, size: int, draft: bool) -> Format:
    key, block = side == "key", _power(dim)
    rows, lanes = (dim, PAGE_TOKENS) if key else (PAGE_TOKENS, dim)
    return Format(
        kind=page.kind,
        key=key,
        dim=dim,
        dim_block=block,
        rows=rows,
        lanes=lanes,
        row_block=block if key else PAGE_TOKENS,
        lane_block=PAGE_TOKENS if key else block,
        stride=page.block or lanes,
        bytes=size * page.block // dim if page.block else size,
        bits=page.bits,
        params_at=page.params_at,
        per_row=page.per == ("channel" if key else "token"),
        symmetric=page.symmetric,
        centered=page.centered,
        rotate=page.rotate,
        rotate_steps=max(page.rotate.bit_length() - 1, 0),
        low_bits=page.low_bits,
        first=page.first,
        first_at=page.first_at,
        second_at=page.second_at,
        draft=draft and page.draft,
        inner=None if page.inner is None else _format(page.inner, page.block, side, size * page.block // dim, False),
    )


def block_of(scheme: Scheme, layer: LayerGeometry, draft: bool = False) -> Block:
    """The block of a layer that :func:`refusal` has let through."""
    key = format_of(scheme.key, layer.key_dim, "key", draft)
    value = format_of(scheme.value, layer.value_dim, "value", draft)
    assert key is not None, scheme.key
    assert value is not None, scheme.value
    return Block(key, value, scheme.head_bytes(layer), align(scheme.key.page_bytes(layer.key_dim)))


def shape_of(layer: LayerGeometry, *blocks: Block) -> Shape:
    """``blocks``: those of the sealed pages, the first page's included."""
    rotate = max(block.keys.rotate for block in blocks)
    return Shape(
        kv_heads=layer.num_kv_heads,
        group=layer.group_size,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        key_block=_power(layer.key_dim),
        value_block=_power(layer.value_dim),
        scale=layer.scale,
        window=layer.window or 0,
        softcap=layer.softcap or 0.0,
        sinks=layer.sinks,
        rotated_keys=rotate > 0,
        key_rotate=rotate,
        key_rotate_steps=max(rotate.bit_length() - 1, 0),
    )


def refusal(scheme: Scheme, layer: LayerGeometry) -> str | None:
    """``None``, or the reason why the kernels cannot run ``layer`` stored as ``scheme``."""
    if layer.latent:
        return "latents are cached on CPUs only"
    if layer.chunked:
        return "the Triton kernels have no chunked attention"
    largest = max(layer.key_dim, layer.value_dim)
    if largest > MAX_DIM:
        return f"head size {largest} is over {MAX_DIM}, the largest of the Triton kernels"
    reason = scheme.supports(layer)
    if reason:
        return reason
    if format_of(scheme.key, layer.key_dim, "key") is None:
        return f"the Triton kernels have no keys coded as '{scheme.key.name}'"
    if format_of(scheme.value, layer.value_dim, "value") is None:
        return f"the Triton kernels have no values coded as '{scheme.value.name}'"
    return None


def _power(size: int) -> int:
    """The least power of two that is not below ``size``; at least 16, the least that tensor cores multiply."""
    return max(16, 1 << (size - 1).bit_length())
