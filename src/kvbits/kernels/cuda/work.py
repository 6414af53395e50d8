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
"""Items for each block at most: the last wave is a small part of the whole."""

OWN, BEGINNING = 3, 4
"""What an own page, and beginning and ending an item, take, in sealed pages: a guess."""


@dataclass(frozen=True)
class Work:
    """What the kernel works on.

    ``tiles`` ``int32 [T, 8]``: sequence, first row, queries, position of the first, first slot, slots, items. ``items``
    ``int32 [n, 4]``: tile, slot, first page, end, the longest first; ``~end`` where the own page follows, in slot 0
    (which is the item's own if both are one partial result). ``first_pages``: those of first pages that have a dtype of
    their own. ``rows``: the most query rows of a tile; ``slots``: partial results of a KV head.
    """

    tiles: Ints
    items: Ints
    first_pages: Ints
    rows: int
    slots: int


def decoding(batch: BatchLayout, group: int) -> Ints:
    """The sequences with few enough new tokens for these kernels, ``int32 [n]``."""
    return np.flatnonzero((batch.counts > 0) & (batch.counts <= MAX_ROWS // group)).astype(np.int32)


def work_list(
    batch: BatchLayout, group: int, kv_heads: int, window: int | None, apart: bool, together: bool, blocks: int
) -> Work:
    """Cut the step of :func:`decoding` for a machine of ``blocks`` blocks at once.

    ``apart``: page 0 has a dtype of its own. A tile's first item has the own page too, and fewer others for it;
    ``together``: in one partial result.
    """
    return _cut(*_tiles(batch, group, window), group, kv_heads, apart, together, blocks)


class WorkList:
    """:func:`work_list` of step after step: cut anew only where a tile has other pages than in the step before."""

    def __init__(self, group: int, kv_heads: int, window: int | None, apart: bool, together: bool, blocks: int) -> None:
        self._group, self._window = group, window
        self._how = group, kv_heads, apart, together, blocks
        self._known: tuple[bytes, Work] | None = None

    def of(self, batch: BatchLayout) -> Work:
        """Valid until the next call."""
        tiles, low, high = _tiles(batch, self._group, self._window)
        key = b"".join(x.tobytes() for x in (tiles[:, :3], low, high))
        if self._known is None or self._known[0] != key:
            self._known = key, _cut(tiles, low, high, *self._how)
        work = self._known[1]
        work.tiles[:, 3] = tiles[:, 3]
        return work


def _cut(
    tiles: Ints, low: Ints, high: Ints, group: int, kv_heads: int, apart: bool, together: bool, blocks: int
) -> Work:
    """``low``, ``high``: the pages before each tile's own."""
    first = (low == 0) & (high > 0) if apart else np.zeros(len(tiles), dtype=bool)
    low = np.where(first, 1, low)
    costs = np.maximum(high - low, 0) + OWN
    cuts = -(-costs // size_of_an_item(costs, kv_heads, blocks))
    of = np.repeat(np.arange(len(tiles)), cuts)
    cut = np.arange(len(of)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    begin, end = (low[of] + np.maximum(costs[of] * (cut + i) // cuts[of] - OWN, 0) for i in (0, 1))
    some = begin < end
    used = some | (cut == 0)  # where an own page takes more than an item may, others have no pages left
    of, cut, begin, end, some = (x[used] for x in (of, cut, begin, end, some))
    partial = (cut > 0) | (some & (not together))  # a slot of its own, beside the own page's
    slots = 1 + np.bincount(of[partial], minlength=len(tiles)) + first
    tiles[:, 4] = np.cumsum(slots) - slots
    tiles[:, 5] = slots
    tiles[:, 6] = np.bincount(of, minlength=len(tiles)) + first
    before = np.cumsum(slots - 1 - first) - (slots - 1 - first)
    slot = np.where(partial, np.cumsum(partial) - before[of], 0)
    longest = np.argsort(begin - end - OWN * (cut == 0), kind="stable")
    items = _columns(len(of), of, slot, begin, np.where(cut == 0, ~end, end))[longest]
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
    sequences = decoding(batch, group)
    if (batch.counts[sequences] == 1).all():
        tiles = np.zeros((len(sequences), 8), dtype=np.int32)
        tiles[:, 0], tiles[:, 1], tiles[:, 2] = sequences, batch.rows[sequences], 1
        tiles[:, 3] = batch.starts[sequences]
    else:
        tiles = _long_tiles(batch, sequences)
    high = tiles[:, 3] // PAGE_TOKENS
    low = np.zeros_like(high) if window is None else np.maximum(tiles[:, 3] - window + 1, 0) // PAGE_TOKENS
    return tiles, low, high


def _long_tiles(batch: BatchLayout, sequences: Ints) -> Ints:
    rows = []
    for s in sequences.tolist():
        start, first = int(batch.starts[s]), int(batch.rows[s])
        position, end = start, start + int(batch.counts[s])
        while position < end:
            stop = min(end, (position // PAGE_TOKENS + 1) * PAGE_TOKENS)
            rows.append((s, first + position - start, stop - position, position, 0, 0, 0, 0))
            position = stop
    return np.array(rows, dtype=np.int32)


def most_items(tiles: int, kv_heads: int, blocks: int) -> int:
    """The most items that :func:`work_list` makes of ``tiles`` tiles."""
    return max(WAVES * blocks // kv_heads, tiles)


def most_slots(tiles: int, items: int, apart: bool, together: bool) -> int:
    """The most partial results of ``tiles`` tiles in ``items`` items."""
    return items + tiles * (apart + (not together))


def size_of_an_item(costs: Ints, kv_heads: int, blocks: int) -> int:
    """What an item costs at most, so that the machine is done soonest: in one wave of items, or in several shorter."""
    each: list[int] = costs.tolist()
    best, soonest = max([*each, 1]), float("inf")
    for wave in range(1, WAVES + 1):
        size = _least(each, wave * blocks // kv_heads)
        if size is not None and wave * (size + BEGINNING) < soonest:
            best, soonest = size, wave * (size + BEGINNING)
    return best


def _least(costs: list[int], room: int) -> int | None:
    """The least size of items of which there are no more than ``room``; ``None`` where there are more tiles."""
    spare = room - len(costs)
    if spare < 0 or not costs:
        return None
    # rounding up adds less than one item a tile
    total, most = sum(costs), max(costs)
    least, most = max(-(-total // room), 1), min(most, -(-total // spare)) if spare else most
    while least < most:
        middle = (least + most) // 2
        if sum([-(-cost // middle) for cost in costs]) <= room:
            most = middle
        else:
            least = middle + 1
    return least
