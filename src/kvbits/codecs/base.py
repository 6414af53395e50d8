"""What a codec is: frozen data that says how one head's page of keys or values becomes bytes.

``reference`` encode and decode live on the codec itself, and all that others ask of a codec: how large a page is, how
it lies in memory (:meth:`Codec.page_format`), what calibration can do for it. The native kernels know it by
:attr:`Codec.native_id`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbits.codecs.packing import pack, packed_bytes, unpack
from kvbits.config import PAGE_TOKENS, LayerGeometry, align

Side = Literal["key", "value"]

NATIVE_IDS = {"raw": 0, "affine": 0, "nibbles": 64, "float8": 128, "codebook": 256, "mixed": 512, "blocks": 1024}
"""Kind of a page -> what its codecs' numbers in ``csrc/codecs/table-inl.h`` begin at; both sides must agree."""


@dataclass(frozen=True)
class Rounding:
    """How the codes of one layer's keys or values are chosen when a page is sealed; what a page means stays the same.

    ``feedback`` ``float32 [kv_heads, dim, dim]``: channels are rounded one after another, in the order ``order``
    ``int32 [kv_heads, dim]`` (``None``: as they come), and the error ``e`` of the ``c``-th takes
    ``e * feedback[head, c, j]`` from every later, ``j``-th one, which compensates it under the metric that the factors
    were made for (as GPTQ rounds weights: Frantar et al., 2022, arXiv:2210.17323). ``clip`` ``float32
    [kv_heads]``: the share of a group's range, about its middle, that asymmetric or codebook codes span; what lies
    outside saturates. ``None`` for either: to nearest, the whole range.
    """

    feedback: Tensor | None = None
    clip: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True)
class LayerRounding:
    """The rounding of a layer's keys and of its values."""

    key: Rounding = Rounding()
    value: Rounding = Rounding()


@dataclass(frozen=True)
class PageFormat:
    """How one head's page of keys or values lies in memory, as plain numbers: what a kernel must know of a codec.

    ``kind`` is the arithmetic, ``bits`` those of a code (of a float's mantissa for ``"float8"``), codes first and the
    parameters from byte ``params_at`` on, one ``per`` token or channel (or page). ``rotate``: channels that are rotated
    together, 0 for none; ``centered``: the middle of each channel's range is stored too. Pages of two parts: the
    second begins at byte ``second_at``, and a draft needs the first alone where ``draft`` says so; ``"mixed"`` pages
    have the ``first`` channels stored at ``bits`` from byte ``first_at`` on, the others at ``low_bits``. ``"blocks"``
    pages are one page ``inner`` after another, for ``block`` channels each.
    """

    kind: str
    bits: int
    params_at: int = 0
    per: Literal["token", "channel", "page"] = "page"
    symmetric: bool = False
    centered: bool = False
    rotate: int = 0
    low_bits: int = 0
    first: int = 0
    first_at: int = 0
    second_at: int = 0
    draft: bool = False
    block: int = 0
    inner: PageFormat | None = None


@dataclass(frozen=True)
class Codec(ABC):
    """How a page of one KV head, ``[64 tokens, dim]``, becomes ``page_bytes(dim)`` bytes.

    A codec may treat keys and values differently (their roles in a dot product differ), hence ``side``.
    """

    name: str

    orders_channels: ClassVar[bool] = False
    """Whether :attr:`Rounding.order` says which channels are stored finer, and no feedback is taken."""

    @abstractmethod
    def page_bytes(self, dim: int) -> int:
        """Bytes of one page of one head, parameters included, a multiple of 64."""

    @abstractmethod
    def encode(self, rows: Tensor, side: Side, rounding: Rounding | None = None) -> Tensor:
        """``float32 [..., 64, dim]`` to ``uint8 [..., page_bytes(dim)]``.

        With ``rounding`` the rows are ``[..., kv_heads, 64, dim]``; a codec without choice ignores it.
        """

    @abstractmethod
    def decode(self, page: Tensor, dim: int, side: Side) -> Tensor:
        """``uint8 [..., page_bytes(dim)]`` to ``float32 [..., 64, dim]``."""

    def decode_draft(self, page: Tensor, dim: int, side: Side) -> Tensor:
        """Like :meth:`decode`, perhaps coarser, from fewer of the page's bytes; the same for most codecs."""
        return self.decode(page, dim, side)

    @property
    def dim_multiple(self) -> int:
        """Head sizes must be multiples of this: the widest vectors are full, and whole groups of codes share bytes."""
        return 16

    def supports(self, dim: int) -> str | None:
        """``None``, or the reason why heads of size ``dim`` cannot be stored."""
        multiple = self.dim_multiple
        return None if dim % multiple == 0 else f"head size {dim} is not a multiple of {multiple}"

    @property
    def native_id(self) -> int | None:
        """The codec's number in ``csrc/codecs/table-inl.h``; ``None``: it has no native kernels, the reference runs."""
        return None

    def page_format(self, dim: int, side: Side) -> PageFormat | None:
        """How a page of heads of size ``dim`` lies in memory; ``None`` for what only the reference can read."""
        return None

    @property
    def candidate(self) -> bool:
        """Whether an allocation of bits may choose this codec: not where another is finer in as many bytes."""
        return self.native_id is not None

    @property
    def fits_range(self) -> bool:
        """Whether a calibrated :attr:`Rounding.clip` is worth its search."""
        return False

    def to_basis(self, rows: Tensor) -> Tensor:
        """``rows`` ``float32 [..., dim]`` in the directions ``B`` in which elements are coded, ``rows @ B``.

        :attr:`Rounding.feedback` and :attr:`Rounding.order` speak of these directions, which for most codecs are the
        channels themselves; a metric ``M`` of the channels is ``B^T M B`` of them.
        """
        return rows

    def bits_per_element(self, dim: int) -> float:
        """Stored bits per key or value element, parameters and padding included."""
        return 8 * self.page_bytes(dim) / (PAGE_TOKENS * dim)

    def _page(self, parts: list[Tensor], dim: int) -> Tensor:
        """``parts`` (any dtype, parameters of one head last) one after another, padded to a page."""
        page = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
        return torch.nn.functional.pad(page, (0, self.page_bytes(dim) - page.shape[-1]))


def pack_side(codes: Tensor, bits: int, side: Side) -> Tensor:
    """Codes ``uint8 [..., 64, dim]`` as bytes (:func:`kvbits.codecs.packing.pack`): keys reduce over channels."""
    return pack(codes.transpose(-1, -2) if side == "key" else codes, bits)


def unpack_side(page: Tensor, bits: int, dim: int, side: Side) -> Tensor:
    """Undo :func:`pack_side` for the first bytes of ``page``."""
    reduction, lanes = (dim, PAGE_TOKENS) if side == "key" else (PAGE_TOKENS, dim)
    codes = unpack(page[..., : packed_bytes(dim, bits)], bits, reduction, lanes)
    return codes.transpose(-1, -2) if side == "key" else codes


@dataclass(frozen=True)
class Scheme:
    """The codecs of one layer's keys and values."""

    key: Codec
    value: Codec

    @property
    def name(self) -> str:
        return self.key.name if self.key.name == self.value.name else f"{self.key.name}/{self.value.name}"

    def head_bytes(self, layer: LayerGeometry) -> int:
        """Bytes of one page of one KV head: its keys, then its values (those of latents are keys)."""
        keys = align(self.key.page_bytes(layer.key_dim))
        return keys if layer.latent else keys + align(self.value.page_bytes(layer.value_dim))

    def layer_bytes(self, layer: LayerGeometry) -> int:
        """Bytes of one page of all KV heads of ``layer``."""
        return layer.num_kv_heads * self.head_bytes(layer)

    def supports(self, layer: LayerGeometry) -> str | None:
        """``None``, or the reason why ``layer`` cannot be stored by this scheme."""
        if layer.latent and self.key.name != self.value.name:
            return "a latent is key and value at once, so name one dtype for both"
        return self.key.supports(layer.key_dim) or (self.key if layer.latent else self.value).supports(layer.value_dim)
