"""What a codec is: frozen data that says how one head's page of keys or values becomes bytes.

``reference`` encode and decode live on the codec itself; the native kernels know it by :attr:`Codec.native_id`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvbits.config import PAGE_TOKENS, LayerGeometry, align

Side = Literal["key", "value"]


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
class Codec(ABC):
    """How a page of one KV head, ``[64 tokens, dim]``, becomes ``page_bytes(dim)`` bytes.

    A codec may treat keys and values differently (their roles in a dot product differ), hence ``side``.
    """

    name: str

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

    @abstractmethod
    def supports(self, dim: int) -> str | None:
        """``None``, or the reason why heads of size ``dim`` cannot be stored."""

    @property
    @abstractmethod
    def native_id(self) -> int:
        """The codec's number in ``csrc/codecs/table-inl.h``; both sides must agree."""

    def basis(self, dim: int) -> Tensor | None:
        """The directions in which a head's elements are coded, the columns of an orthogonal ``float32 [dim, dim]``.

        ``None``: the channels themselves. :attr:`Rounding.feedback` and :attr:`Rounding.order` speak of these
        directions: a metric ``M`` of the channels is ``B^T M B`` of them.
        """
        return None

    def bits_per_element(self, dim: int) -> float:
        """Stored bits per key or value element, parameters and padding included."""
        return 8 * self.page_bytes(dim) / (PAGE_TOKENS * dim)


@dataclass(frozen=True)
class Scheme:
    """The codecs of one layer's keys and values."""

    key: Codec
    value: Codec

    @property
    def name(self) -> str:
        return self.key.name if self.key.name == self.value.name else f"{self.key.name}/{self.value.name}"

    def head_bytes(self, layer: LayerGeometry) -> int:
        """Bytes of one page of one KV head: its keys, then its values."""
        return align(self.key.page_bytes(layer.key_dim)) + align(self.value.page_bytes(layer.value_dim))

    def layer_bytes(self, layer: LayerGeometry) -> int:
        """Bytes of one page of all KV heads of ``layer``."""
        return layer.num_kv_heads * self.head_bytes(layer)

    def supports(self, layer: LayerGeometry) -> str | None:
        """``None``, or the reason why ``layer`` cannot be stored by this scheme."""
        return self.key.supports(layer.key_dim) or self.value.supports(layer.value_dim)
