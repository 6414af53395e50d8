"""The oracle: every scheme, in torch, slow and obvious. Other backends are compared with it.

All arithmetic is float32. What earlier pages hold is always read back from the pool's bytes, never from the rows that
were written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.codecs import LayerRounding, Place, Scheme
from kvbits.config import PAGE_TOKENS, LayerGeometry, align
from kvbits.kernels.base import Backend, BatchLayout, Ints
from kvbits.pool import LayerView


class ReferenceBackend(Backend):
    """Plain torch on the CPU; no state."""

    name = "reference"

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return scheme.supports(layer)

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        layer = view.geometry
        out = query.new_empty(batch.num_rows, layer.num_heads, layer.value_dim)
        for s in range(len(batch.counts)):
            rows = slice(int(batch.rows[s]), int(batch.rows[s]) + int(batch.counts[s]))
            if rows.start == rows.stop:
                continue
            start = int(batch.starts[s])
            keys, values = _own_rows(view, batch.head[s], start, key[rows], value[rows])
            pages = _Sealed(view, batch.frames_of(view)[s], batch.sink[s], batch.draft)
            _store(view, pages, batch.head[s], batch.tail[s], start, keys, values, batch.again)
            out[rows] = _attend(view, pages, start, query[rows].float(), keys, values, sinks).to(query.dtype)
        return out


@dataclass(frozen=True)
class _Sealed:
    """Where the sealed pages of one sequence lie; the first may have a format of its own."""

    view: LayerView
    frames: Ints
    sink: Ints
    draft: bool

    def read(self, page: int) -> tuple[Tensor, Tensor]:
        return read_page(self.view, *self._where(page), self.draft)

    def write(self, page: int, keys: Tensor, values: Tensor) -> None:
        place, frame = self._where(page)
        rounding = self.view.rounding if place is self.view.sealed else None
        write_page(self.view, place, frame, keys, values, rounding)

    def _where(self, page: int) -> tuple[Place, int]:
        sink = self.view.first_page
        if page == 0 and sink is not None:
            return sink, int(self.sink[sink.frame])
        return self.view.sealed, int(self.frames[page])


def _own_rows(view: LayerView, head: Ints, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """16-bit rows from the beginning of the page that holds token ``start`` to the end of the step, as float32."""
    key, value = key.to(torch.bfloat16).float(), value.to(torch.bfloat16).float()
    stored = start % PAGE_TOKENS
    if not stored:
        return key, value
    old_key, old_value = read_page(view, view.open, int(head[view.open.frame]))
    return torch.cat([old_key[:stored], key]), torch.cat([old_value[:stored], value])


def _store(
    view: LayerView,
    pages: _Sealed,
    head: Ints,
    tail: Ints,
    start: int,
    keys: Tensor,
    values: Tensor,
    again: bool,
) -> None:
    """Seal the pages that ``keys`` and ``values`` fill and leave the rest in the open page, unless it is read again."""
    first = start // PAGE_TOKENS
    if tail[0] != head[0]:  # tentative: the first page stays in 16 bit as well
        _store_open(view, head, keys[:PAGE_TOKENS], values[:PAGE_TOKENS])
    full = len(keys) // PAGE_TOKENS
    for p in range(full):
        page = slice(p * PAGE_TOKENS, (p + 1) * PAGE_TOKENS)
        pages.write(first + p, keys[page], values[page])
    rest = len(keys) - full * PAGE_TOKENS
    if rest and not again:
        _store_open(view, tail, keys[-rest:], values[-rest:])


def _store_open(view: LayerView, frames: Ints, keys: Tensor, values: Tensor) -> None:
    padding = (0, 0, 0, 0, 0, PAGE_TOKENS - len(keys))
    keys, values = (torch.nn.functional.pad(x, padding) for x in (keys, values))
    write_page(view, view.open, int(frames[view.open.frame]), keys, values)


def _attend(
    view: LayerView, sealed: _Sealed, start: int, query: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None
) -> Tensor:
    """``query`` ``[count, heads, key_dim]``; ``keys``, ``values``: rows from the page of ``start`` on."""
    first, end = start // PAGE_TOKENS, start + len(query)
    parts = []
    for p in range(first, (end - 1) // PAGE_TOKENS + 1):
        begin, stop = max(start, p * PAGE_TOKENS), min(end, (p + 1) * PAGE_TOKENS)
        # pages that the window has left behind are not read: their frames may hold anything
        oldest = view.geometry.first_seen(begin) // PAGE_TOKENS
        pages = [sealed.read(q) for q in range(oldest, p)]
        own = slice((p - first) * PAGE_TOKENS, stop - first * PAGE_TOKENS)
        seen_keys = torch.cat([*(k for k, _ in pages), keys[own]])
        seen_values = torch.cat([*(v for _, v in pages), values[own]])
        positions = torch.arange(begin, stop)
        visible = torch.arange(oldest * PAGE_TOKENS, stop)
        rows = query[begin - start : stop - start]
        parts.append(_softmax_attention(view.geometry, rows, positions, seen_keys, seen_values, visible, sinks))
    return torch.cat(parts)


def _softmax_attention(
    layer: LayerGeometry,
    query: Tensor,
    query_positions: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """``[rows, heads, key_dim]`` against ``[tokens, kv_heads, dim]``; gives ``[rows, heads, value_dim]``."""
    keys = keys.repeat_interleave(layer.group_size, dim=1)
    values = values.repeat_interleave(layer.group_size, dim=1)
    scores = torch.einsum("rhd,thd->hrt", query, keys) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    distance = query_positions[:, None] - key_positions[None, :]
    hidden = distance < 0
    if layer.window is not None and layer.chunked:
        hidden |= query_positions[:, None] // layer.window != key_positions[None, :] // layer.window
    elif layer.window is not None:
        hidden |= distance >= layer.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(keys)]
    return torch.einsum("hrt,thd->rhd", weights, values)


def read_page(view: LayerView, place: Place, frame: int, draft: bool = False) -> tuple[Tensor, Tensor]:
    """Keys ``float32 [64, kv_heads, key_dim]`` and values of this layer in the page at ``frame``, on the host."""
    key_block, value_block = (block.cpu() for block in _blocks(view, place, frame))
    key, value = place.scheme.key, place.scheme.value
    if view.geometry.latent:  # without drafts
        keys = key.decode(key_block, view.geometry.key_dim, "key").transpose(0, 1)
        return keys, latent_values(keys, view.geometry)
    keys = (key.decode_draft if draft else key.decode)(key_block, view.geometry.key_dim, "key")
    values = (value.decode_draft if draft else value.decode)(value_block, view.geometry.value_dim, "value")
    return keys.transpose(0, 1), values.transpose(0, 1)


def write_page(
    view: LayerView, place: Place, frame: int, keys: Tensor, values: Tensor, rounding: LayerRounding | None = None
) -> None:
    """Encode ``float32 [64, kv_heads, dim]`` into the page at ``frame``."""
    rounding = rounding or LayerRounding()
    key_block, value_block = _blocks(view, place, frame)
    key_block.copy_(place.scheme.key.encode(keys.transpose(0, 1), "key", rounding.key))
    if view.geometry.latent:
        return
    value_block.copy_(place.scheme.value.encode(values.transpose(0, 1), "value", rounding.value))


def latent_values(keys: Tensor, layer: LayerGeometry) -> Tensor:
    """The values ``float32 [..., value_dim]`` of ``keys`` ``float32 [..., key_dim]`` that are latents, in 16 bit."""
    return keys[..., : layer.value_dim].to(torch.bfloat16).float()


def _blocks(view: LayerView, place: Place, frame: int) -> tuple[Tensor, Tensor]:
    """Views ``uint8 [kv_heads, page_bytes]`` of the layer's key pages and value pages in ``frame``."""
    assert 0 <= frame < len(view.buffer), (frame, view.index)
    layer, scheme = view.geometry, place.scheme
    size = scheme.layer_bytes(layer)
    # An open page may lie in several frames side by side.
    start = view.buffer.storage_offset() + frame * view.buffer.stride(0) + place.offset
    heads = view.buffer.as_strided(
        (layer.num_kv_heads, size // layer.num_kv_heads), (size // layer.num_kv_heads, 1), start
    )
    key_bytes = scheme.key.page_bytes(layer.key_dim)
    value_bytes = 0 if layer.latent else scheme.value.page_bytes(layer.value_dim)
    values_at = align(key_bytes)
    return heads[:, :key_bytes], heads[:, values_at : values_at + value_bytes]
