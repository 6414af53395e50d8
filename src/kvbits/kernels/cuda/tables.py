"""A decode step's tables on the device: the work, and views of what Triton's kernels read too."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbits.config import LayerGeometry
from kvbits.kernels.base import BatchLayout
from kvbits.kernels.cuda.attend import Tables
from kvbits.kernels.cuda.variant import together
from kvbits.kernels.cuda.work import Work, WorkList, decoding, most_items, most_slots
from kvbits.kernels.static import Arrays, padded, upload
from kvbits.kernels.triton.tables import StepTables
from kvbits.pool import LayerView


def tables_of(batch: BatchLayout, view: LayerView, blocks: int, steps: StepTables) -> Tables:
    """What layers like ``view`` need of ``batch``, on the pool's device; ``blocks`` run at once there."""
    layer, first, known = view.geometry, view.first_page, batch.shared
    joined = together(view.sealed.scheme, layer)
    key = (Work, layer.num_heads, layer.num_kv_heads, layer.window, first is not None, joined, blocks)
    if key not in known:
        known[key] = _work(batch, layer, first is not None, joined, blocks, view.buffer.device)
    sink_frames = None if first is None or not len(steps.sink) else steps.sink[first.frame]
    places = steps.starts, steps.first_rows, steps.sealed, steps.head[view.open.frame]
    work, tiles, items, first_pages = known[key]
    all_decode = batch.static or len(decoding(batch, layer.group_size)) == len(batch.counts)
    return Tables(work, tiles, items, first_pages, *places, sink_frames, all_decode and not batch.completes)


def _work(
    batch: BatchLayout, layer: LayerGeometry, apart: bool, joined: bool, blocks: int, device: torch.device
) -> tuple[Work, Tensor, Tensor, Tensor]:
    """The work, and its tables. Of a static layout the items are as many as there can be, and may be of the tile -1."""
    sequences = len(batch.counts)
    listed = WorkList(layer.group_size, layer.num_kv_heads, layer.window, apart, joined, blocks)

    def work_of() -> Work:
        work = listed.of(batch)
        if not batch.static:
            return work
        most = most_items(sequences, layer.num_kv_heads, blocks)
        items, alone = padded(work.items, most, -1), padded(work.first_pages, sequences, -1)
        slots = most_slots(sequences, most, apart, joined)
        return Work(padded(work.tiles, sequences, 0), items, alone, layer.group_size, slots)

    work = work_of()
    made = [work]

    def arrays() -> Arrays:
        work = made.pop() if made else work_of()
        return work.tiles, work.items, work.first_pages

    tiles, items, first_pages = upload(arrays, device, batch)
    return work, tiles, items, first_pages
