"""Pages of one side of a layer from rows and back, outside any pool: for blocks that leave another engine."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbits.codecs import Codec, Rounding, Side
from kvbits.config import PAGE_TOKENS
from kvbits.kernels import _native


class PageCoder:
    """Encodes and decodes in the caller's thread, without Python's lock; threads may share one.

    Codecs without a native kernel go through torch. Bytes are those of the codec's own ``encode``, numbers those of
    its ``decode``, rounded to bfloat16.
    """

    def __init__(self, isa: str = "auto") -> None:
        self._cpu = _native.Cpu(isa, 1, 0)

    def encode(self, codec: Codec, side: Side, rows: Tensor, pages: Tensor, rounding: Rounding | None = None) -> None:
        """``rows`` ``bfloat16 [pages * 64, heads, dim]``, last dimension contiguous, into ``pages`` ``uint8 [pages,
        heads, page_bytes]``, last dimension contiguous."""
        given = rounding or Rounding()
        coded = _coded(codec, side, rows, pages)
        if coded is not None and _native.encode(
            self._cpu, coded, _address(given.feedback), _address(given.order), _address(given.clip)
        ):
            return
        whole = rows.unflatten(0, (-1, PAGE_TOKENS)).transpose(1, 2).float()
        pages.copy_(codec.encode(whole, side, rounding))

    def decode(self, codec: Codec, side: Side, pages: Tensor, rows: Tensor) -> None:
        """Undo :meth:`encode`: ``pages`` into ``rows``, of the same shapes."""
        coded = _coded(codec, side, rows, pages)
        if coded is not None and _native.decode(self._cpu, coded):
            return
        found = codec.decode(pages.contiguous(), rows.shape[-1], side)
        rows.copy_(found.transpose(1, 2).flatten(0, 1).to(rows.dtype))


def _coded(codec: Codec, side: Side, rows: Tensor, pages: Tensor) -> _native.Coded | None:
    tokens, heads, dim = rows.shape
    assert rows.dtype == torch.bfloat16, rows.dtype
    assert tokens % PAGE_TOKENS == 0, rows.shape
    assert pages.shape == (tokens // PAGE_TOKENS, heads, codec.page_bytes(dim)), (pages.shape, rows.shape)
    assert rows.stride(-1) == pages.stride(-1) == 1, (rows.stride(), pages.stride())
    if codec.native_id is None:
        return None
    return _native.Coded(
        codec.native_id,
        side == "key",
        tokens // PAGE_TOKENS,
        heads,
        dim,
        rows.data_ptr(),
        rows.stride(0),
        rows.stride(1),
        pages.data_ptr(),
        pages.stride(0),
        pages.stride(1),
    )


def _address(table: Tensor | None) -> int:
    return 0 if table is None else table.data_ptr()
