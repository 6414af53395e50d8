"""A decode step's tables on the device, in one copy."""

from __future__ import annotations

from kvbits.kernels.base import BatchLayout
from kvbits.kernels.cuda.attend import Tables
from kvbits.kernels.cuda.work import Work, most_items, work_list
from kvbits.kernels.static import Arrays, padded, upload
from kvbits.pool import LayerView


def tables_of(batch: BatchLayout, view: LayerView, blocks: int) -> Tables:
    """What layers like ``view`` need of ``batch``, on the pool's device; ``blocks`` run at once there.

    Of a static layout the items are as many as there can be; those that are none are of the tile -1.
    """
    layer, first = view.geometry, view.first_page
    sequences = len(batch.counts)

    def work_of() -> Work:
        work = work_list(batch, layer.group_size, layer.num_kv_heads, layer.window, first is not None, blocks)
        if not batch.static:
            return work
        most = most_items(sequences, layer.num_kv_heads, blocks)
        items, alone = padded(work.items, most, -1), padded(work.first_pages, sequences, -1)
        return Work(padded(work.tiles, sequences, 0), items, alone, layer.group_size, most + sequences)

    work = work_of()
    made = [work]

    def arrays() -> Arrays:
        work = made.pop() if made else work_of()
        found = [work.tiles, work.items, work.first_pages, batch.starts, batch.rows[:-1], batch.sealed]
        found.append(batch.head[:, view.open.frame])
        if first is not None and batch.sink.shape[1]:
            found.append(batch.sink[:, first.frame])
        return found

    parts = upload(arrays, view.buffer.device, batch)
    tiles, items, first_pages, starts, first_rows, sealed, open_frames = parts[:7]
    sink_frames = parts[7] if len(parts) > 7 else None
    return Tables(work, tiles, items, first_pages, starts, first_rows, sealed, open_frames, sink_frames)
