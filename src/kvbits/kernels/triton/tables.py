"""A step's tables on the device, in one copy: which rows, pages and queries each program works on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.base import SPLIT_PAGES, BatchLayout, Ints

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
    pages = [
        (s, page)
        for s, (start, count) in enumerate(zip(batch.starts.tolist(), batch.counts.tolist(), strict=True))
        for page in range(start // PAGE_TOKENS, (start + count) // PAGE_TOKENS)
    ]
    apart = [p for p in pages if first_page_apart and p[1] == 0]
    columns = -(-batch.sealed.shape[1] // 16) * 16
    arrays: list[NDArray[np.int32]] = [
        batch.starts,
        batch.counts,
        batch.rows[:-1],
        np.pad(batch.sealed, ((0, 0), (0, columns - batch.sealed.shape[1])), constant_values=-1),
        _columns(batch.head),
        _columns(batch.tail),
        _columns(batch.sink),
        np.array([p for p in pages if p not in apart], dtype=np.int32).reshape(-1, 2),
        np.array(apart, dtype=np.int32).reshape(-1, 2),
    ]
    return StepTables(*_upload(arrays, device))


def step_tiles(batch: BatchLayout, group: int, device: torch.device) -> tuple[Tiles, Tiles]:
    """The tiles of sequences with few new tokens (decode), and of the others (prefill), for ``group`` heads a row."""
    least = _decode_rows(group)
    sizes = least, max(least, PREFILL_ROWS)
    many = set(prompts(batch, group))
    tiles: tuple[list[tuple[int, int, int, int]], ...] = ([], [])
    for s, (start, count) in enumerate(zip(batch.starts.tolist(), batch.counts.tolist(), strict=True)):
        kind = 1 if s in many else 0
        position, end = start, start + count
        while position < end:
            stop = min(end, position + sizes[kind] // group, (position // PAGE_TOKENS + 1) * PAGE_TOKENS)
            tiles[kind].append((s, int(batch.rows[s]) + position - start, stop - position, position))
            position = stop
    # a tile without anyone beside it first: the longest wait the shortest
    arrays = [np.array(sorted(t, key=lambda x: -x[3]), dtype=np.int32).reshape(-1, 4) for t in tiles]
    tables = _upload(arrays, device)
    deepest = max((t[3] // PAGE_TOKENS for t in tiles[0]), default=0)
    slots = 1 + -(-deepest // SPLIT_PAGES)
    return Tiles(tables[0], sizes[0], slots), Tiles(tables[1], sizes[1], 0)


def prompts(batch: BatchLayout, group: int) -> list[int]:
    """The sequences with more new tokens than a tile of decode has queries."""
    return np.flatnonzero(batch.counts > _decode_rows(group) // group).tolist()


def _decode_rows(group: int) -> int:
    return max(16, 1 << (group - 1).bit_length())


def _columns(frames: Ints) -> Ints:
    """Column by column, each padded so that it begins at a multiple of 16 bytes: kernels are compiled for that."""
    return np.ascontiguousarray(np.pad(frames, ((0, -len(frames) % 4), (0, 0))).T)


def _upload(arrays: list[NDArray[np.int32]], device: torch.device) -> list[Tensor]:
    """``arrays`` as views of one tensor on ``device``, each at a multiple of 16 bytes."""
    starts = np.cumsum([0] + [-(-a.size // 4) * 4 for a in arrays])
    block = np.zeros(max(int(starts[-1]), 4), dtype=np.int32)
    for start, a in zip(starts, arrays, strict=False):
        block[start : start + a.size] = a.ravel()
    whole = torch.from_numpy(block).to(device)
    return [whole[start : start + a.size].view(a.shape) for start, a in zip(starts.tolist(), arrays, strict=False)]
