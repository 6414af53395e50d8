"""A decode step's tables on the device, in one copy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbits.kernels.base import BatchLayout
from kvbits.kernels.cuda.attend import Tables
from kvbits.kernels.cuda.work import work_list
from kvbits.pool import LayerView


def tables_of(batch: BatchLayout, view: LayerView, blocks: int) -> Tables:
    """What layers like ``view`` need of ``batch``, on the pool's device; ``blocks`` run at once there."""
    layer, first = view.geometry, view.first_page
    work = work_list(batch, layer.group_size, layer.num_kv_heads, layer.window, first is not None, blocks)
    sink = None if first is None or not batch.sink.shape[1] else batch.sink[:, first.frame]
    arrays = [work.tiles, work.items, work.first_pages, batch.starts, batch.rows[:-1], batch.sealed]
    arrays += [batch.head[:, view.open.frame], *([] if sink is None else [sink])]
    parts = _upload(arrays, view.buffer.device)
    tiles, items, first_pages, starts, first_rows, sealed, open_frames = parts[:7]
    sink_frames = parts[7] if sink is not None else None
    return Tables(work, tiles, items, first_pages, starts, first_rows, sealed, open_frames, sink_frames)


def _upload(arrays: list[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    sizes = [a.size for a in arrays]
    whole = torch.from_numpy(np.concatenate([a.ravel() for a in arrays]).astype(np.int32, copy=False)).to(device)
    return [part.view(a.shape) for part, a in zip(whole.split(sizes), arrays, strict=True)]
