"""One function for each kernel: its arguments and its grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvbits.codecs import LayerRounding, Place, Rounding
from kvbits.config import PAGE_TOKENS
from kvbits.kernels.device import on_device
from kvbits.kernels.triton.append import append_rows
from kvbits.kernels.triton.attention import decode_splits, merge_splits, prefill_tiles
from kvbits.kernels.triton.format import Block, Shape
from kvbits.kernels.triton.pieces import Piece, Tiling
from kvbits.kernels.triton.prompt import attend_decoded
from kvbits.kernels.triton.seal import seal_pages
from kvbits.kernels.triton.tables import StepTables, Tiles
from kvbits.kernels.triton.unpack import unpack_pages
from kvbits.pool import LayerView


class Launch(Protocol):
    """Runs a kernel; whatever only wants to know which kernels run takes its place."""

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], **options: Any
    ) -> None:
        """``args`` by position, compile-time ``constants`` by name, ``options`` of the compiler."""


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], **options: Any) -> None:
    """On the device of the first of ``args``, whichever is the current one."""
    first = args[0]
    while isinstance(first, tuple):
        first = first[0]
    with on_device(first.device):
        kernel[grid](*args, **constants, **options)


Pointers = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


_ATTENTION = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@dataclass(frozen=True)
class LayerKernels:
    """What does not change from step to step: formats, how this layer's codes are chosen (on the device), whether its
    pages are read in parts, and how prompts are tiled."""

    view: LayerView
    shape: Shape
    sealed: Block
    open: Block
    sink: Block | None
    key_rounding: Pointers
    value_rounding: Pointers
    parts: bool
    tiling: Tiling


@dataclass(frozen=True)
class Sides:
    """The step's rows ``[rows, heads, dim]``: queries in their own type, keys and values in bfloat16."""

    query: Tensor
    key: Tensor
    value: Tensor


def rounding_of(rounding: LayerRounding | None, device: torch.device) -> tuple[Pointers, Pointers]:
    """(clip, feedback, order, rank) of keys and of values."""
    found = rounding or LayerRounding()
    return _pointers(found.key, device), _pointers(found.value, device)


def _pointers(rounding: Rounding, device: torch.device) -> Pointers:
    order = None if rounding.order is None else rounding.order.to(device, torch.int32).contiguous()
    rank = None if order is None else order.argsort(-1).to(torch.int32)
    clip, feedback = (
        None if x is None else x.to(device, torch.float32).contiguous() for x in (rounding.clip, rounding.feedback)
    )
    return clip, feedback, order, rank


def seal(launch: Launch, layer: LayerKernels, tables: StepTables, sides: Sides) -> None:
    """Seal what the step completes, the first page in its own format where it has one."""
    view = layer.view
    plain: Pointers = (None, None, None, None)
    _seal(
        launch, layer, tables, sides, tables.pages, view.sealed, layer.sealed, (tables.sealed, tables.sealed.stride(0)),
        layer.key_rounding, layer.value_rounding,
    )  # fmt: skip
    if view.first_page is not None and layer.sink is not None and len(tables.sink_pages):
        _seal(
            launch, layer, tables, sides, tables.sink_pages, view.first_page, layer.sink,
            (tables.sink[view.first_page.frame], 1), plain, plain,
        )  # fmt: skip


def _seal(
    launch: Launch,
    layer: LayerKernels,
    tables: StepTables,
    sides: Sides,
    pages: Tensor,
    place: Place,
    block: Block,
    frames: tuple[Tensor, int],
    key_rounding: Pointers,
    value_rounding: Pointers,
) -> None:
    if not len(pages):
        return
    buffer, opened = layer.view.buffer, layer.view.open
    cache = buffer, buffer.stride(0), opened.offset, place.offset
    args = (
        _rows(sides.key), _rows(sides.value), cache, pages, tables.starts, tables.first_rows,
        tables.head[opened.frame], frames, key_rounding, value_rounding,
    )  # fmt: skip
    grid = len(pages), layer.shape.kv_heads, 2
    # a product that is fused with a sum is rounded once less: the bytes would be other ones
    launch(seal_pages, grid, args, {"OPEN": layer.open, "SEALED": block}, num_warps=4, enable_fp_fusion=False)


def append(launch: Launch, layer: LayerKernels, tables: StepTables, sides: Sides) -> None:
    """Store the rows of pages that stay open."""
    buffer, opened = layer.view.buffer, layer.view.open
    args = (
        _rows(sides.key),
        _rows(sides.value),
        (buffer, buffer.stride(0), opened.offset),
        tables.starts,
        tables.counts,
        tables.first_rows,
        tables.head[opened.frame],
        tables.tail[opened.frame],
    )
    grid = len(tables.starts), layer.shape.kv_heads, 4
    launch(append_rows, grid, args, {"OPEN": layer.open}, num_warps=4)


def decode(
    launch: Launch,
    layer: LayerKernels,
    tables: StepTables,
    tiles: Tiles,
    sides: Sides,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attention of sequences with few new tokens."""
    count = len(tiles.table)
    if not count:
        return
    shape = layer.shape
    size = (count, shape.kv_heads, tiles.slots, tiles.rows)
    partial = (
        torch.empty(*size, shape.value_block, device=out.device),
        torch.empty(*size, device=out.device),
        torch.empty(*size, device=out.device),
    )
    args = *_attention_arguments(layer, tables, tiles, sides), partial
    parts = layer.parts and sides.query.dtype == torch.bfloat16
    constants = {**_attention_constants(layer, tiles), "PARTS": parts}
    # parts of pages go through one warp's registers: it waits for no other
    launch(decode_splits, size[:3], args, constants, **{**_ATTENTION, "num_warps": 1 if parts else 4})
    merge = partial, tiles.table, sinks, _rows(out), tiles.slots
    launch(merge_splits, size[:2], merge, {"SHAPE": shape, "M": tiles.rows}, **_ATTENTION)


def prefill(
    launch: Launch,
    layer: LayerKernels,
    tables: StepTables,
    tiles: Tiles,
    sides: Sides,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attention of the other sequences, each tile by itself: float32 rows."""
    if not len(tiles.table):
        return
    args = *_attention_arguments(layer, tables, tiles, sides), sinks, _rows(out)
    grid = len(tiles.table), layer.shape.kv_heads
    launch(prefill_tiles, grid, args, _attention_constants(layer, tiles), **{**_ATTENTION, "num_warps": 8})


def unpack(
    launch: Launch, layer: LayerKernels, tables: StepTables, pages: Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Keys and values of ``pages`` ``int32 [n, 2]`` (sequence, page) one after another, ``[kv_heads, 64 n, dim]``."""
    view, first, tokens = layer.view, layer.view.first_page, len(pages) * PAGE_TOKENS
    keys, values = (
        torch.empty(layer.shape.kv_heads, tokens, dim, dtype=dtype, device=pages.device)
        for dim in (layer.shape.key_dim, layer.shape.value_dim)
    )
    if tokens:
        cache = view.buffer, view.buffer.stride(0), view.sealed.offset, 0 if first is None else first.offset
        frames = (tables.sealed, tables.sealed.stride(0)), _sink_frames(layer, tables)
        constants = {"SHAPE": layer.shape, "SEALED": layer.sealed, "SINK": layer.sink}
        grid = len(pages), layer.shape.kv_heads
        launch(unpack_pages, grid, (cache, *frames, pages, keys, values, tokens), constants, num_warps=4)
    return keys, values


def attend_pages(
    launch: Launch,
    layer: LayerKernels,
    tables: StepTables,
    pieces: list[Piece],
    cut: bool,
    tiling: Tiling,
    sides: Sides,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Attention of prompts in bfloat16, whose pages are decoded piece by piece. ``cut``: a tile is in several."""
    view, shape = layer.view, layer.shape
    carried = None
    if cut:
        size = out.shape[:2]
        carried = tuple(torch.empty(*size, *last, device=out.device) for last in ((shape.value_dim,), (), ()))
    cache = view.buffer, view.buffer.stride(0), view.open.offset
    rows = _rows(sides.query), _rows(sides.key), _rows(sides.value)
    constants = {"SHAPE": shape, "OPEN": layer.open, "M": tiling.rows, "PAGES": tiling.pages}
    step = tables.starts, tables.first_rows, tables.head[view.open.frame]
    for piece in pieces:
        keys, values = unpack(launch, layer, tables, piece.pages)
        decoded = keys, values, keys.shape[1]
        args = *rows, cache, piece.tiles, *step, *decoded, sinks, _rows(out), carried
        launch(
            attend_decoded, (len(piece.tiles), shape.kv_heads), args, constants, enable_fp_fusion=True, **tiling.options
        )


def _sink_frames(layer: LayerKernels, tables: StepTables) -> Tensor:
    """Without first pages in a format of their own the pointer is not followed."""
    first = layer.view.first_page
    return tables.starts if first is None or not len(tables.sink) else tables.sink[first.frame]


def _attention_constants(layer: LayerKernels, tiles: Tiles) -> dict[str, Any]:
    return {"SHAPE": layer.shape, "SEALED": layer.sealed, "OPEN": layer.open, "SINK": layer.sink, "M": tiles.rows}


def _attention_arguments(layer: LayerKernels, tables: StepTables, tiles: Tiles, sides: Sides) -> tuple[Any, ...]:
    view = layer.view
    sink_offset = 0 if view.first_page is None else view.first_page.offset
    return (
        _rows(sides.query),
        _rows(sides.key),
        _rows(sides.value),
        (view.buffer, view.buffer.stride(0), view.sealed.offset, view.open.offset, sink_offset),
        tiles.table,
        tables.starts,
        tables.first_rows,
        (tables.sealed, tables.sealed.stride(0)),
        tables.head[view.open.frame],
        _sink_frames(layer, tables),
    )


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    return x, x.stride(0), x.stride(1)
