"""A layer's decode step with the compiled kernels: their arguments, and how often they are launched."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvbits.codecs import Place
from kvbits.kernels.cuda.variant import Variant, variant_of
from kvbits.kernels.cuda.work import Work
from kvbits.pool import LayerView

_LOG2E = 1.4426950408889634


class Step(ctypes.Structure):
    """``Step`` of ``decode.cu``, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "query", "key", "value", "out", "cache", "items", "tiles", "sealed", "starts", "first_rows", "open_frames",
            "sinks", "partial", "arrived",
        )),
        *((name, ctypes.c_int64) for name in (
            "query_row", "query_head", "key_row", "key_head", "value_row", "value_head", "out_row", "out_head",
            "frame_bytes", "sealed_at", "open_at", "sealed_columns",
        )),
        *((name, ctypes.c_int32) for name in ("kv_heads", "group", "window", "stores")),
        *((name, ctypes.c_float) for name in ("scale", "cap")),
    )  # fmt: skip


class Launch(Protocol):
    """Runs a kernel; an emulation takes its place where there is no GPU."""

    def __call__(self, variant: Variant, grid: tuple[int, int], step: Step) -> None:
        """``grid``: items, KV heads."""

    def prepare(self, variant: Variant) -> None:
        """Make ``variant`` ready to run."""


@dataclass(frozen=True)
class Tables:
    """A step's work and page tables on the device, ``int32``; ``sealed`` ``[S, columns]``, the others ``[S]``.

    ``tiles``, ``items``, ``first_pages``: those of ``work``; ``sink_frames``: frames of first pages that have a dtype
    of their own. ``stores``: every sequence of the step has a tile, and none completes a page.
    """

    work: Work
    tiles: Tensor
    items: Tensor
    first_pages: Tensor
    starts: Tensor
    first_rows: Tensor
    sealed: Tensor
    open_frames: Tensor
    sink_frames: Tensor | None
    stores: bool


def attend(
    launch: Launch,
    view: LayerView,
    tables: Tables,
    rows: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
    arrived: Tensor,
    out: Tensor,
    stores: bool = False,
) -> None:
    """Write the decoding sequences' rows of ``out`` ``bfloat16 [rows, heads, dim]``.

    ``rows``: query, key and value ``bfloat16 [rows, heads, dim]``, the last dimension contiguous and the other strides
    even; ``sinks`` ``float32 [heads]``; ``arrived`` ``int32``, at least tiles times KV heads zeros, which are zeros
    again afterwards. ``stores``: add the rows of keys and values to the open pages, of which the step completes none.
    The layer has kernels for its formats (:func:`kvbits.kernels.cuda.variant.variant_of`).
    """
    layer, work, (query, key, value) = view.geometry, tables.work, rows
    if not len(work.tiles):
        return
    variant = _variant(view.sealed, view, work.rows)
    size = work.slots, layer.num_kv_heads, variant.rows * (variant.dim + 2)
    partial = torch.empty(size, dtype=torch.float32, device=out.device)
    # by position, in the order of the fields: a third of the time that names take
    step = Step(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), view.buffer.data_ptr(), None,
        tables.tiles.data_ptr(), None, tables.starts.data_ptr(), tables.first_rows.data_ptr(),
        tables.open_frames.data_ptr(), None if sinks is None else sinks.data_ptr(), partial.data_ptr(),
        arrived.data_ptr(),
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *out.stride()[:2],
        view.buffer.stride(0), 0, view.open.offset, 0,
        layer.num_kv_heads, layer.group_size, layer.window or 0, stores,
        layer.scale * _LOG2E, (layer.softcap or 0.0) * _LOG2E,
    )  # fmt: skip
    _run(launch, variant, view.sealed, tables.items, tables.sealed, step)
    if view.first_page is not None and tables.sink_frames is not None and len(work.first_pages):
        first = _variant(view.first_page, view, work.rows)
        _run(launch, first, view.first_page, tables.first_pages, tables.sink_frames.view(-1, 1), step)


def _variant(place: Place, view: LayerView, rows: int) -> Variant:
    variant = variant_of(place.scheme, view.geometry, rows)
    assert isinstance(variant, Variant), variant
    return variant


def _run(launch: Launch, variant: Variant, place: Place, items: Tensor, frames: Tensor, step: Step) -> None:
    step.items, step.sealed = items.data_ptr(), frames.data_ptr()
    step.sealed_columns, step.sealed_at = frames.stride(0), place.offset
    launch(variant, (len(items), step.kv_heads), step)
