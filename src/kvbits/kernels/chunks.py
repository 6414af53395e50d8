"""A piece of another engine's 16-bit cache as kvbits' pages in one run of bytes, for tiers and other machines.

Bytes: a header of :data:`HEADER_BYTES` (``docs/vllm.md``), then layer after layer the pages of its keys and of its
values, ``[pages, kv_heads, page_bytes]`` each, then the tokens beyond the last whole page as they are. The header names
what the bytes mean; whatever reads them as something else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbits.codecs import Codec, LayerRounding, Policy, Rounding, Side
from kvbits.config import PAGE_TOKENS, LayerGeometry
from kvbits.errors import CacheError, UnsupportedError
from kvbits.kernels.coder import PageCoder

HEADER_BYTES = 1024
_MAGIC = b"kvbits-chunk\x00"
_FORMAT = 1


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
        """The first :data:`HEADER_BYTES` bytes."""
        text = json.dumps({"format": _FORMAT, **self.__dict__}).encode()
        if len(_MAGIC) + len(text) > HEADER_BYTES:
            raise UnsupportedError(f"the model's name has {len(self.model)} characters, too many for a chunk's header")
        return (_MAGIC + text).ljust(HEADER_BYTES, b"\x00")

    def check(self, header: bytes) -> None:
        """Raise ``CacheError``, naming what differs, unless ``header`` is this one's."""
        if not header.startswith(_MAGIC):
            raise CacheError("these bytes are no chunk of kvbits': they do not begin with its mark")
        try:
            found: Any = json.loads(header[len(_MAGIC) :].rstrip(b"\x00"))
        except ValueError as error:
            raise CacheError(f"the header of a chunk is damaged: {error}") from error
        expected = {"format": _FORMAT, **self.__dict__}
        if found != expected:
            known = found if isinstance(found, dict) else {}
            parts = [f"{k} {known.get(k)!r} instead of {v!r}" for k, v in expected.items() if known.get(k) != v]
            raise CacheError(f"a chunk is of another kind: {', '.join(parts) or 'it says more than is known'}")


class ChunkCoder:
    """Codes chunks ``[2, layers, tokens, kv_heads * head_size]`` (keys, values) of one model by ``policy``."""

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

    def format(self, model: str, shape: tuple[int, ...], dtype: torch.dtype) -> ChunkFormat:
        """Of a chunk of ``shape``. Raises ``UnsupportedError`` for a shape or dtype that this is not for."""
        width = self.kv_heads * self.head_size
        if len(shape) != 4 or shape[0] != 2 or shape[1] != len(self.policy.layers) or shape[3] != width:
            raise UnsupportedError(
                f"a chunk has the shape {tuple(shape)}; expected [2, {len(self.policy.layers)}, tokens, {width}]"
            )
        if dtype not in (torch.bfloat16, torch.float16):
            raise UnsupportedError(f"a chunk has the dtype {dtype}; expected bfloat16 or float16")
        name = str(dtype).removeprefix("torch.")
        return ChunkFormat(model, self.policy.name, shape[1], self.kv_heads, self.head_size, shape[2], name)

    def size(self, tokens: int) -> int:
        """Bytes of a chunk of ``tokens`` tokens."""
        pages, rest = divmod(tokens, PAGE_TOKENS)
        codecs = [c for s in self.policy.layers for c in (s.key, s.value)]
        whole = sum(pages * self.kv_heads * c.page_bytes(self.head_size) for c in codecs)
        return HEADER_BYTES + whole + len(codecs) * rest * self.kv_heads * self.head_size * 2

    def encode(self, chunk: Tensor, model: str, out: Tensor) -> int:
        """Write ``chunk`` to the beginning of ``out`` ``uint8 [bytes]``; returns the bytes written."""
        header = self.format(model, tuple(chunk.shape), chunk.dtype).header()
        out[:HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        for codec, side, rounding, rows, pages in self._parts(chunk.to(torch.bfloat16), out):
            self._coder.encode(codec, side, rows, pages, rounding)
        rest = self._rest(out, chunk)
        rest.copy_(chunk[:, :, chunk.shape[2] - rest.shape[2] :])
        return self.size(chunk.shape[2])

    def decode(self, data: Tensor, model: str, chunk: Tensor) -> None:
        """Undo :meth:`encode`: ``data`` ``uint8 [bytes]`` into ``chunk``. Raises ``CacheError`` for another's bytes."""
        expected = self.format(model, tuple(chunk.shape), chunk.dtype)
        if len(data) < self.size(chunk.shape[2]):
            raise CacheError(f"a chunk of {chunk.shape[2]} tokens has {len(data)} bytes, too few")
        expected.check(data[:HEADER_BYTES].numpy().tobytes())
        rows = chunk if chunk.dtype == torch.bfloat16 else torch.empty_like(chunk, dtype=torch.bfloat16)
        for codec, side, _, part, pages in self._parts(rows, data):
            self._coder.decode(codec, side, pages, part)
        if rows is not chunk:
            chunk.copy_(rows)
        rest = self._rest(data, chunk)
        chunk[:, :, chunk.shape[2] - rest.shape[2] :] = rest

    def _parts(self, chunk: Tensor, data: Tensor) -> Iterator[tuple[Codec, Side, Rounding, Tensor, Tensor]]:
        """Every layer's keys and values: codec, side, rounding, rows ``[tokens, heads, dim]`` and pages."""
        count = chunk.shape[2] // PAGE_TOKENS
        at = HEADER_BYTES
        rounding = self.policy.rounding or (LayerRounding(),) * len(self.policy.layers)
        sides: tuple[Side, Side] = ("key", "value")
        for index, scheme in enumerate(self.policy.layers):
            for number, (codec, side) in enumerate(zip((scheme.key, scheme.value), sides, strict=True)):
                rows = chunk[number, index, : count * PAGE_TOKENS].unflatten(-1, (self.kv_heads, self.head_size))
                size = count * self.kv_heads * codec.page_bytes(self.head_size)
                pages = data[at : at + size].view(count, self.kv_heads, -1) if size else None
                if pages is not None:
                    yield codec, side, rounding[index].key if side == "key" else rounding[index].value, rows, pages
                at += size

    def _rest(self, data: Tensor, chunk: Tensor) -> Tensor:
        tokens = chunk.shape[2] % PAGE_TOKENS
        end = self.size(chunk.shape[2])
        size = 2 * len(self.policy.layers) * tokens * chunk.shape[3] * 2
        return data[end - size : end].view(chunk.dtype).view(2, len(self.policy.layers), tokens, chunk.shape[3])
