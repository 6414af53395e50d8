"""A step's tables on the device, in one copy: which rows, pages and queries each program works on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.base import SPLIT_PAGES, BatchLayout, Ints
from kvbits.kernels.static import padded, upload

PREFILL_ROWS = 64
"""Rows (queries times heads of a group) of a prefill tile; more only for larger groups."""


@dataclass(frozen=True)
class StepTables:
    """What every layer needs; all ``int32`` on the device.

    ``starts``, ``counts``, ``first_rows`` ``[S]``; ``sealed`` ``[S, columns]``; ``head``,
    ``tail``, ``sink`` ``[frames, S]``; ``pages`` and ``sink_pages`` ``[n, 2]``: sequence and page to seal.
    """

    starts: Tensor
    counts: Tensor
    first_rows: Tensor
    sealed: Tensor
    head: Tensor
    tail: Tensor
    sink: Tensor
    pages: Tensor
    sink_pages: Tensor


@dataclass(frozen=True)
class Tiles:
    """Queries in tiles of ``rows`` rows, ``int32 [n, 4]``: sequence, first row, queries, position of the first.

    ``slots`` of partial results for each tile (decode).
    """

    table: Tensor
    rows: int
    slots: int


def step_tables(batch: BatchLayout, first_page_apart: bool, device: torch.device) -> StepTables:
    """The tables of ``batch``; ``first_page_apart``: page 0 of a sequence has a format of its own."""
    return StepTables(*upload(lambda: _arrays(batch, first_page_apart), device, batch))


def _arrays(batch: BatchLayout, first_page_apart: bool) -> list[Ints]:
    first, end = batch.starts // PAGE_TOKENS, (batch.starts + batch.counts) // PAGE_TOKENS
    full = [(s, page) for s in np.flatnonzero(end > first).tolist() for page in range(first[s], end[s])]
    pages = np.array(full, dtype=np.int32).reshape(-1, 2)
    apart = (pages[:, 1] == 0) & first_page_apart
    kinds = [pages[~apart], pages[apart]] if len(pages) else [pages, pages]
    if batch.static:
        kinds = [padded(x, len(batch.counts), -1) for x in kinds]
    sealed = batch.sealed
    if sealed.shape[1] % 16:
        sealed = np.pad(sealed, ((0, 0), (0, -sealed.shape[1] % 16)), constant_values=-1)
    return [
        batch.starts,
        batch.counts,
        batch.rows[:-1],
        sealed,
        _columns(batch.head),
        _columns(batch.tail),
        _columns(batch.sink),
        *kinds,
    ]


def decode_tiles(batch: BatchLayout, group: int, device: torch.device) -> Tiles:
    """The tiles of sequences with few new tokens, for ``group`` heads a row."""
    least = _decode_rows(group)

    def table() -> Ints:
        few = _tiles(batch, np.flatnonzero(batch.counts <= least // group).tolist(), group, least)
        return padded(few, len(batch.counts), 0) if batch.static else few

    (few,) = upload(lambda: [table()], device, batch)
    deepest = batch.sealed.shape[1] if batch.static else int(few_pages(batch, group))
    return Tiles(few, least, 1 + -(-deepest // SPLIT_PAGES))


def prompt_tiles(batch: BatchLayout, group: int, device: torch.device) -> Tiles:
    """The tiles of the other sequences."""
    rows = max(_decode_rows(group), PREFILL_ROWS)
    (many,) = upload(lambda: [_tiles(batch, prompts(batch, group), group, rows)], device, batch)
    return Tiles(many, rows, 0)


def few_pages(batch: BatchLayout, group: int) -> int:
    """The most pages before a query's own, of sequences with few new tokens."""
    last = (batch.starts + batch.counts - 1)[batch.counts <= _decode_rows(group) // group]
    return int(last.max(initial=0)) // PAGE_TOKENS


def _tiles(batch: BatchLayout, sequences: Iterable[int], group: int, rows: int) -> Ints:
    """Of ``sequences``, in tiles of up to ``rows`` rows of one page."""
    tiles = []
    for s in sequences:
        start, first = int(batch.starts[s]), int(batch.rows[s])
        position, end = start, start + int(batch.counts[s])
        while position < end:
            stop = min(end, position + rows // group, (position // PAGE_TOKENS + 1) * PAGE_TOKENS)
            tiles.append((s, first + position - start, stop - position, position))
            position = stop
    # a tile without anyone beside it first: the longest wait the shortest
    return np.array(sorted(tiles, key=lambda x: -x[3]), dtype=np.int32).reshape(-1, 4)


def prompts(batch: BatchLayout, group: int) -> list[int]:
    """The sequences with more new tokens than a tile of decode has queries."""
    found: list[int] = np.flatnonzero(batch.counts > _decode_rows(group) // group).tolist()
    return found


def _decode_rows(group: int) -> int:
    return max(16, 1 << (group - 1).bit_length())


def _columns(frames: Ints) -> Ints:
    """Column by column, each padded so that it begins at a multiple of 16 bytes: kernels are compiled for that."""
    whole = np.zeros((frames.shape[1], -(-len(frames) // 4) * 4), dtype=np.int32)
    whole[:, : len(frames)] = frames.T
    return whole
