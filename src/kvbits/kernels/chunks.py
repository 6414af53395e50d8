"""A piece of another engine's 16-bit cache as kvbits' pages in one run of bytes, for tiers and other machines.

Bytes: a header of :data:`HEADER_BYTES` (``docs/vllm.md``), then layer after layer the pages of its keys and of its
values, ``[pages, kv_heads, page_bytes]`` each, then the tokens beyond the last whole page as they are. The header names
what the bytes mean, and ends with a checksum of what follows; whatever reads them as something else is refused.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbits.codecs import Codec, LayerRounding, Policy, Rounding, Side
from kvbits.config import PAGE_TOKENS, LayerGeometry
from kvbits.errors import CacheError, UnsupportedError
from kvbits.kernels.coder import PageCoder

HEADER_BYTES = 1024
_MAGIC = b"kvbits-chunk\x00"
_FORMAT = 2
_SUM_BYTES = 4


@dataclass(frozen=True)
class ChunkFormat:
    """What a chunk's bytes mean: whose keys and values, coded how, in which shape."""

    model: str
    policy: str
    layers: int
    kv_heads: int
    head_size: int
    tokens: int
    dtype: str

    def header(self) -> bytes:
        """The first bytes of a chunk, up to the checksum."""
        text, size = json.dumps({"format": _FORMAT, **self.__dict__}).encode(), HEADER_BYTES - _SUM_BYTES
        if len(_MAGIC) + len(text) > size:
            raise UnsupportedError(f"the model's name has {len(self.model)} characters, too many for a chunk's header")
        return (_MAGIC + text).ljust(size, b"\x00")

    def check(self, header: bytes) -> None:
        """Raise ``CacheError``, naming what differs, unless ``header`` is this one's."""
        if header == self.header():
            return
        if not header.startswith(_MAGIC):
            raise CacheError("these bytes are no chunk of kvbits': they do not begin with its mark")
        try:
            found: Any = json.loads(header[len(_MAGIC) :].rstrip(b"\x00"))
        except (ValueError, RecursionError) as error:
            raise CacheError(f"the header of a chunk is damaged: {error}") from error
        expected = {"format": _FORMAT, **self.__dict__}
        known = found if isinstance(found, dict) else {}
        parts = [f"{k} {known.get(k)!r} instead of {v!r}" for k, v in expected.items() if known.get(k) != v]
        raise CacheError(f"a chunk is of another kind: {', '.join(parts) or 'its header is damaged'}")


class ChunkCoder:
    """Codes chunks of one model's keys and values by ``policy``."""

    def __init__(self, policy: Policy, kv_heads: int, head_size: int) -> None:
        """Raises ``UnsupportedError`` where a codec does not fit the heads, or for a first page of its own dtype."""
        if policy.sink is not None:
            raise UnsupportedError(f"the policy '{policy.label}' has a first page of its own; a chunk may be any pages")
        layer = LayerGeometry(kv_heads, kv_heads, head_size, head_size, 1.0)
        for index, scheme in enumerate(policy.layers):
            if reason := scheme.supports(layer):
                raise UnsupportedError(f"layer {index} cannot be stored as '{scheme.name}': {reason}")
        self.policy, self.kv_heads, self.head_size = policy, kv_heads, head_size
        self._coder = PageCoder()

    def format(self, model: str, tokens: int, dtype: torch.dtype) -> ChunkFormat:
        """Of a chunk of ``tokens`` tokens. Raises ``UnsupportedError`` for a dtype that this is not for."""
        if dtype not in (torch.bfloat16, torch.float16):
            raise UnsupportedError(f"a chunk has the dtype {dtype}; expected bfloat16 or float16")
        name = str(dtype).removeprefix("torch.")
        layers = len(self.policy.layers)
        return ChunkFormat(model, self.policy.name, layers, self.kv_heads, self.head_size, tokens, name)

    def heads(self, chunk: Tensor) -> Tensor:
        """``chunk`` ``[2, layers, tokens, kv_heads * head_size]`` head by head. Raises ``UnsupportedError`` for another
        shape."""
        layers, width = len(self.policy.layers), self.kv_heads * self.head_size
        if chunk.dim() != 4 or chunk.shape[:2] != (2, layers) or chunk.shape[3] != width:
            raise UnsupportedError(
                f"a chunk has the shape {tuple(chunk.shape)}; expected [2, {layers}, tokens, {width}]"
            )
        return chunk.view(*chunk.shape[:3], self.kv_heads, self.head_size)

    def size(self, tokens: int) -> int:
        """Bytes of a chunk of ``tokens`` tokens."""
        pages, rest = divmod(tokens, PAGE_TOKENS)
        codecs = [c for s in self.policy.layers for c in (s.key, s.value)]
        whole = sum(pages * self.kv_heads * c.page_bytes(self.head_size) for c in codecs)
        return HEADER_BYTES + whole + len(codecs) * rest * self.kv_heads * self.head_size * 2

    def encode(self, shares: Sequence[Tensor], model: str, out: Tensor) -> int:
        """Write a chunk to the beginning of ``out`` ``uint8 [bytes]``; returns the bytes written.

        ``shares`` ``[2, layers, tokens, heads, head_size]`` (keys, values), the last dimension contiguous, each with
        some of the KV heads, in their order; tokens may take two dimensions.
        """
        start = self._format(model, shares).header()
        size = self.size(shares[0].shape[2:-2].numel())
        for part in self._parts(shares, out):
            rows = part.of.flatten(0, -3)
            whole = part.pages.shape[0] * PAGE_TOKENS
            if whole:
                self._coder.encode(part.codec, part.side, rows[:whole].to(torch.bfloat16), part.pages, part.rounding)
            part.rest.copy_(rows[whole:])
        header = bytearray(start + _sum(out[HEADER_BYTES:size]))
        out[:HEADER_BYTES] = torch.frombuffer(header, dtype=torch.uint8)
        return size

    def decode(self, data: Tensor, model: str, shares: Sequence[Tensor]) -> None:
        """Undo :meth:`encode`: ``data`` ``uint8 [bytes]`` into ``shares``. Raises ``CacheError`` for another's bytes
        and for damaged ones, before anything is written."""
        expected = self._format(model, shares)
        size = self.size(expected.tokens)
        header = data[:HEADER_BYTES].numpy().tobytes()
        expected.check(header[:-_SUM_BYTES])
        if len(data) < size:
            raise CacheError(f"a chunk of {expected.tokens} tokens has {len(data)} bytes instead of {size}, too few")
        if header[-_SUM_BYTES:] != _sum(data[HEADER_BYTES:size]):
            raise CacheError("a chunk is damaged: its checksum is another")
        for part in self._parts(shares, data):
            rows = part.of.flatten(0, -3)  # a copy where blocks are apart, whose rows are written back
            whole = part.pages.shape[0] * PAGE_TOKENS
            coded = rows if rows.dtype == torch.bfloat16 else torch.empty_like(rows, dtype=torch.bfloat16)
            if whole:
                self._coder.decode(part.codec, part.side, part.pages, coded[:whole])
            if coded is not rows:
                rows[:whole] = coded[:whole]
            rows[whole:] = part.rest
            if rows.data_ptr() != part.of.data_ptr():
                part.of.copy_(rows.view_as(part.of))

    def _format(self, model: str, shares: Sequence[Tensor]) -> ChunkFormat:
        heads = sum(share.shape[-2] for share in shares)
        shapes = {(share.shape[0], share.shape[1], share.shape[-1], share.shape[2:-2].numel()) for share in shares}
        tokens = shares[0].shape[2:-2].numel()
        assert shapes == {(2, len(self.policy.layers), self.head_size, tokens)}, shapes
        assert heads == self.kv_heads, heads
        return self.format(model, tokens, shares[0].dtype)

    def _parts(self, shares: Sequence[Tensor], data: Tensor) -> Iterator[_Part]:
        """Every share of every layer's keys and values, and where its bytes are in ``data``."""
        pages, rest = divmod(shares[0].shape[2:-2].numel(), PAGE_TOKENS)
        at, layers, row = HEADER_BYTES, len(self.policy.layers), self.kv_heads * self.head_size
        rounding = self.policy.rounding or (LayerRounding(),) * layers
        end = self.size(pages * PAGE_TOKENS + rest)
        beyond = data[end - 4 * layers * rest * row : end].view(shares[0].dtype)
        beyond = beyond.view(2, layers, rest, self.kv_heads, self.head_size)
        sides: tuple[Side, Side] = ("key", "value")
        for index, scheme in enumerate(self.policy.layers):
            for number, (codec, side) in enumerate(zip((scheme.key, scheme.value), sides, strict=True)):
                size = pages * self.kv_heads * codec.page_bytes(self.head_size)
                coded = data[at : at + size].view(pages, self.kv_heads, codec.page_bytes(self.head_size))
                at, head = at + size, 0
                chosen = rounding[index].key if side == "key" else rounding[index].value
                for share in shares:
                    own = slice(head, head + share.shape[-2])
                    yield _Part(codec, side, _of_heads(chosen, own), share[number, index], coded[:, own],
                                beyond[number, index][:, own])  # fmt: skip
                    head = own.stop


def _sum(data: Tensor) -> bytes:
    return zlib.crc32(data.numpy().data).to_bytes(_SUM_BYTES, "little")


class _Part(NamedTuple):
    """One side of a layer of one share: rows ``[tokens, heads, dim]``, pages ``[pages, heads, bytes]``, and the rows
    beyond them."""

    codec: Codec
    side: Side
    rounding: Rounding
    of: Tensor
    pages: Tensor
    rest: Tensor


def _of_heads(rounding: Rounding, heads: slice) -> Rounding:
    feedback, clip, order = (
        None if x is None else x[heads] for x in (rounding.feedback, rounding.clip, rounding.order)
    )
    return Rounding(feedback, clip, order)
