"""Steps whose tables keep their sizes and addresses: what a recorded graph of kernels reads again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbits.kernels.base import BatchLayout

Arrays = Sequence[NDArray[np.int32]]


def static_layout(
    sequences: int, pages: int, open_frames: int, sink_frames: int, draft: bool = False, completes: bool = True,
    groups: int = 1,
) -> BatchLayout:  # fmt: skip
    """A layout for steps of one new token each of up to ``sequences`` sequences of up to ``pages`` sealed pages.

    Without ``completes`` for steps that complete none.

    It begins without any; :func:`refill` makes it a step. Sequences that are not there have no new token (``counts`` 0)
    and one row each, which means nothing.
    """
    return BatchLayout(
        starts=np.zeros(sequences, dtype=np.int32),
        counts=np.zeros(sequences, dtype=np.int32),
        rows=np.arange(sequences + 1, dtype=np.int32),
        sealed=np.full((groups * sequences, pages), -1, dtype=np.int32),
        head=np.zeros((sequences, open_frames), dtype=np.int32),
        tail=np.zeros((sequences, open_frames), dtype=np.int32),
        sink=np.full((sequences, sink_frames), -1, dtype=np.int32),
        draft=draft,
        completes=completes,
        static=True,
    )


def refill(layout: BatchLayout, batch: BatchLayout) -> None:
    """Make a static ``layout`` the step ``batch``, and so all tables that were made of it, where they are."""
    count = len(batch.counts)
    assert (batch.counts == 1).all(), batch.counts
    assert layout.completes or not batch.completes, batch.starts
    assert batch.sealed.shape[1] <= layout.sealed.shape[1], (batch.sealed.shape, layout.sealed.shape)
    for name in ("starts", "counts", "head", "tail", "sink"):
        own = getattr(layout, name)
        own[:count] = getattr(batch, name)
        own[count:] = -1 if name == "sink" else 0
    groups, deep = len(batch.sealed) // count, batch.sealed.shape[1]
    sealed = layout.sealed.reshape(groups, len(layout.counts), -1)
    sealed[:, :count, :deep] = batch.sealed.reshape(groups, count, deep)
    sealed[:, :count, deep:] = -1
    for refresh in layout.refreshers:
        refresh()


def upload(make: Callable[[], Arrays], device: torch.device, batch: BatchLayout) -> list[Tensor]:
    """The arrays as views of one tensor on ``device``, each at a multiple of 16 bytes; in one copy.

    Of a static ``batch`` they are made again at every :func:`refill` and copied from pinned memory to where they were:
    the copy before must be over then, as it is when the step's tokens have come back.
    """
    arrays = make()
    starts = np.cumsum([0] + [-(-a.size // 4) * 4 for a in arrays]).tolist()
    pinned = batch.static and device.type == "cuda"
    host = torch.zeros(max(starts[-1], 4), dtype=torch.int32, pin_memory=pinned)
    block = host.numpy()

    def pack(arrays: Arrays) -> None:
        for start, a in zip(starts, arrays, strict=False):
            block[start : start + a.size] = a.ravel()

    pack(arrays)
    whole = host.to(device, copy=batch.static, non_blocking=pinned)
    if batch.static:

        def refresh() -> None:
            pack(make())
            whole.copy_(host, non_blocking=pinned)

        batch.refreshers.append(refresh)
    return [whole[start : start + a.size].view(a.shape) for start, a in zip(starts, arrays, strict=False)]


def padded(table: NDArray[np.int32], rows: int, value: int) -> NDArray[np.int32]:
    """``table`` ``[n, columns]`` with ``rows`` rows, those that are added full of ``value``."""
    assert len(table) <= rows, (table.shape, rows)
    whole = np.full((rows, table.shape[1]), value, dtype=np.int32)  # np.pad takes ten times as long
    whole[: len(table)] = table
    return whole
