"""The work of a decode step as one flat list, cut so that a machine's blocks are all busy and end together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.base import BatchLayout, Ints
from kvbits.kernels.cuda.variant import MAX_ROWS

WAVES = 4
"""Items for each block where there are more tiles than blocks: the last wave is a small part of the whole."""


@dataclass(frozen=True)
class Work:
    """What the kernel works on.

    ``tiles`` ``int32 [T, 8]``: sequence, first row, queries, position of the first, first slot, slots. ``items``
    ``int32 [n, 4]``: tile, slot, first page, end; the own page ends at -1. ``first_pages``: those of first pages that
    have a dtype of their own. ``rows``: the most query rows of a tile; ``slots``: partial results of a KV head.
    """

    tiles: Ints
    items: Ints
    first_pages: Ints
    rows: int
    slots: int


def decoding(batch: BatchLayout, group: int) -> Ints:
    """The sequences with few enough new tokens for these kernels, ``int32 [n]``."""
    return np.flatnonzero((batch.counts > 0) & (batch.counts <= MAX_ROWS // group)).astype(np.int32)


def work_list(batch: BatchLayout, group: int, kv_heads: int, window: int | None, apart: bool, blocks: int) -> Work:
    """Cut the step of :func:`decoding` for a machine of ``blocks`` blocks at once.

    ``apart``: page 0 has a dtype of its own. Slot 0 of a tile is its own page.
    """
    tiles, low, high = _tiles(batch, group, window)
    first = (low == 0) & (high > 0) if apart else np.zeros(len(tiles), dtype=bool)
    low = np.where(first, 1, low)
    pages = np.maximum(high - low, 0)
    cuts = -(-pages // pages_of_an_item(pages, kv_heads, blocks))
    slots = 1 + cuts + first
    tiles[:, 4] = np.cumsum(slots) - slots
    tiles[:, 5] = slots
    of = np.repeat(np.arange(len(tiles)), cuts)
    cut = np.arange(len(of)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    many = cuts[of]
    begin, end = (low[of] + pages[of] * (cut + i) // many for i in (0, 1))
    longest = np.argsort(begin - end, kind="stable")  # they go first
    own = _columns(len(tiles), np.arange(len(tiles)), 0, 0, -1)
    items = np.concatenate([own, _columns(len(of), of, 1 + cut, begin, end)[longest]]) if len(of) else own
    alone = np.flatnonzero(first)
    apart_items = _columns(len(alone), alone, slots[alone] - 1, 0, 1)
    rows = int(tiles[:, 2].max(initial=0)) * group
    return Work(tiles, items, apart_items, rows, int(slots.sum()))


def _columns(rows: int, *columns: NDArray[np.signedinteger[Any]] | int) -> Ints:
    table = np.empty((rows, len(columns)), dtype=np.int32)
    for i, column in enumerate(columns):
        table[:, i] = column
    return table


def _tiles(batch: BatchLayout, group: int, window: int | None) -> tuple[Ints, Ints, Ints]:
    """Tiles, and the pages ``low`` to ``high - 1`` that come before their own; a tile lies in one page."""
    rows = []
    for s in decoding(batch, group).tolist():
        position, end = int(batch.starts[s]), int(batch.starts[s] + batch.counts[s])
        while position < end:
            stop = min(end, (position // PAGE_TOKENS + 1) * PAGE_TOKENS)
            rows.append(
                (s, int(batch.rows[s]) + position - int(batch.starts[s]), stop - position, position, 0, 0, 0, 0)
            )
            position = stop
    tiles = np.array(rows, dtype=np.int32).reshape(-1, 8)
    high = tiles[:, 3] // PAGE_TOKENS
    low = np.zeros_like(high) if window is None else np.maximum(tiles[:, 3] - window + 1, 0) // PAGE_TOKENS
    return tiles, low, high


def most_items(tiles: int, kv_heads: int, blocks: int) -> int:
    """The most items that :func:`work_list` makes of ``tiles`` tiles."""
    return max(WAVES * blocks // kv_heads, 2 * tiles)


def pages_of_an_item(pages: Ints, kv_heads: int, blocks: int) -> int:
    """The least number of pages an item may have so that no more items arise than the machine is to have.

    One for each block where that many can be had, else :data:`WAVES` times as many: own pages count too.
    """
    if not len(pages) or not pages.any():
        return 1
    room = blocks // kv_heads - len(pages)
    if room < np.count_nonzero(pages):
        room = max(WAVES * blocks // kv_heads - len(pages), int(np.count_nonzero(pages)))
    least, most = 1, int(pages.max())
    while least < most:
        middle = (least + most) // 2
        if int((-(-pages // middle)).sum()) <= room:
            most = middle
        else:
            least = middle + 1
    return least
