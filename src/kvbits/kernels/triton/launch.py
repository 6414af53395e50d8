"""One function for each kernel: its arguments and its grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.codecs import LayerRounding, Place, Rounding
from kvbits.kernels.triton.append import append_rows
from kvbits.kernels.triton.attention import decode_splits, merge_splits, prefill_tiles
from kvbits.kernels.triton.form import Block, Form, Shape
from kvbits.kernels.triton.seal import seal_pages
from kvbits.kernels.triton.tables import StepTables, Tiles
from kvbits.pool import LayerView

Pointers = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LayerKernels:
    """What does not change from step to step: forms, and how this layer's codes are chosen (on the device)."""

    view: LayerView
    shape: Shape
    sealed: Block
    open: Block
    sink: Block | None
    key_rounding: Pointers
    value_rounding: Pointers


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


def seal(layer: LayerKernels, tables: StepTables, sides: Sides) -> None:
    """Seal what the step completes, the first page in its own form where it has one."""
    view = layer.view
    plain: Pointers = (None, None, None, None)
    _seal(
        layer, tables, sides, tables.pages, view.sealed, layer.sealed, (tables.sealed, tables.sealed.stride(0)),
        layer.key_rounding, layer.value_rounding,
    )  # fmt: skip
    if view.sink is not None and layer.sink is not None and len(tables.sink_pages):
        _seal(
            layer, tables, sides, tables.sink_pages, view.sink, layer.sink, (tables.sink[view.sink.frame], 1),
            plain, plain,
        )  # fmt: skip


def _seal(
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
    parts: tuple[tuple[Tensor, Form, Pointers, int, int], ...] = (
        (sides.key, block.key, key_rounding, 0, 0),
        (sides.value, block.value, value_rounding, layer.open.values_at, block.values_at),
    )
    for rows, form, rounding, open_at, at in parts:
        cache = (buffer, buffer.stride(0), opened.offset + open_at, layer.open.bytes, place.offset + at, block.bytes)
        seal_pages[(len(pages), layer.shape.kv_heads)](
            _rows(rows), cache, pages, tables.starts, tables.first_rows, tables.head[opened.frame], frames, rounding,
            FORM=form, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def append(layer: LayerKernels, tables: StepTables, sides: Sides) -> None:
    """Store the rows of pages that stay open."""
    buffer, opened = layer.view.buffer, layer.view.open
    for rows, form, at in ((sides.key, layer.open.key, 0), (sides.value, layer.open.value, layer.open.values_at)):
        append_rows[(len(rows), layer.shape.kv_heads)](
            _rows(rows), (buffer, buffer.stride(0), opened.offset, layer.open.bytes, at), tables.row_sequence,
            tables.starts, tables.counts, tables.first_rows, tables.head[opened.frame], tables.tail[opened.frame],
            KEY=form.key, DIM=form.dim, BLOCK=form.dim_block, num_warps=1,
        )  # fmt: skip


def decode(
    layer: LayerKernels, tables: StepTables, tiles: Tiles, sides: Sides, sinks: Tensor | None, out: Tensor
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
    decode_splits[(count, shape.kv_heads, tiles.slots)](
        *_attention_arguments(layer, tables, tiles, sides), partial,
        SHAPE=shape, SEALED=layer.sealed, OPEN=layer.open, SINK=layer.sink, M=tiles.rows, num_warps=4, num_stages=2,
    )  # fmt: skip
    merge_splits[(count, shape.kv_heads)](
        partial, tiles.table, sinks, _rows(out), tiles.slots, SHAPE=shape, M=tiles.rows, num_warps=4
    )


def prefill(
    layer: LayerKernels, tables: StepTables, tiles: Tiles, sides: Sides, sinks: Tensor | None, out: Tensor
) -> None:
    """Attention of the other sequences."""
    if not len(tiles.table):
        return
    shape = layer.shape
    wide = max(shape.key_block, shape.value_block) > 128
    prefill_tiles[(len(tiles.table), shape.kv_heads)](
        *_attention_arguments(layer, tables, tiles, sides), sinks, _rows(out),
        SHAPE=shape, SEALED=layer.sealed, OPEN=layer.open, SINK=layer.sink, M=tiles.rows,
        num_warps=8 if wide else 4, num_stages=2,
    )  # fmt: skip


def _attention_arguments(layer: LayerKernels, tables: StepTables, tiles: Tiles, sides: Sides) -> tuple[object, ...]:
    view = layer.view
    sink_offset = 0 if view.sink is None else view.sink.offset
    # without first pages in a form of their own the pointer is not followed
    sink = tables.starts if view.sink is None or not len(tables.sink) else tables.sink[view.sink.frame]
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
        sink,
    )


def _rows(x: Tensor) -> tuple[Tensor, int, int]:
    return x, x.stride(0), x.stride(1)
