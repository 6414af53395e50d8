"""What a step's prompts see before their own pages, in pieces that fit a scratch of decoded pages.

A page that a chunk's queries share is decoded once a layer and step. Sequences lie side by side in a piece; one that
is too deep for a piece goes through several, and its tiles carry their state from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbits.config import PAGE_TOKENS, LayerGeometry
from kvbits.kernels.base import BatchLayout, Ints
from kvbits.kernels.static import upload
from kvbits.kernels.triton.tables import prompts

SCRATCH_BYTES = 128 << 20
"""Most that decoded pages take: 32,768 tokens of 8 KV heads of 128."""


LEAST_SHARED = 64 << 10
WIDE_SHARED = 192 << 10
"""What two stages of pages of heads of 256 take beside 128 rows of queries."""


@dataclass(frozen=True)
class Tiling:
    """How ``attend_decoded`` runs: ``rows`` (queries times heads of a group) of a tile, ``pages`` decoded ones at a
    time, ``warps``, ``stages`` of loads under way, the most ``registers`` of a thread (``None``: as many as needed)."""

    rows: int
    pages: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """The compiler's."""
        least = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages} | least


@dataclass(frozen=True)
class Piece:
    """``pages`` ``int32 [n, 2]``: sequence and page of each slot of the scratch.

    ``tiles`` ``int32 [n, 8]``: sequence; first row (queries times heads of a group, from the sequence's first new
    token on) and rows, all of one page; pages to see, from the first to before the last, and the slot of the first;
    whether it is the tile's first piece, and its last.
    """

    pages: Tensor
    tiles: Tensor


def tiling_of(layer: LayerGeometry, shared: int) -> Tiling:
    """``shared``: bytes of shared memory that a program can have.

    On an H100 a chunk of 8,192 tokens, 32 query and 8 KV heads of 128, took 1.44 ms with two stages and 1.11 with
    three; 1.08 with two and 128 registers, so that two programs share a multiprocessor.
    """
    wide = max(layer.key_dim, layer.value_dim) > 128
    if shared < WIDE_SHARED:
        return Tiling(64, 1, 8, 1) if wide else Tiling(128, 1, 8, 2) if layer.group_size > 1 else Tiling(64, 1, 4, 2)
    if wide:
        return Tiling(128, 1, 8, 2)
    if layer.group_size == 1:
        return Tiling(64, 1, 4, 3)
    plain = layer.window is None and layer.softcap is None
    return Tiling(128, 1, 8, 2, 128) if plain else Tiling(128, 1, 8, 3)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on ``device`` can have; 64 KiB where torch does not say."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return LEAST_SHARED
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", LEAST_SHARED))


def pieces_of(batch: BatchLayout, layer: LayerGeometry, rows: int, device: torch.device) -> tuple[list[Piece], bool]:
    """The pieces of all prompts of ``batch``, made once for all layers that can share them; whether tiles are in
    several."""
    most = max(SCRATCH_BYTES // (PAGE_TOKENS * layer.num_kv_heads * (layer.key_dim + layer.value_dim) * 2), 1)
    group, window = layer.group_size, layer.window or 0
    key = (Piece, group, rows, window, most)
    if key not in batch.shared:
        arrays = _pieces(batch, group, rows, window, most)
        cut = any((tiles[:, 6:] == 0).any() for tiles in arrays[1::2])
        found = upload(lambda: arrays, device, batch) if arrays else []
        pieces = [Piece(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
        batch.shared[key] = pieces, cut
    known: tuple[list[Piece], bool] = batch.shared[key]
    return known


def _pieces(batch: BatchLayout, group: int, rows: int, window: int, most: int) -> list[Ints]:
    """Pages and tiles of one piece after those of another."""
    arrays: list[Ints] = []
    for runs in _runs(batch, group, window, most):
        pages, tiles, slot = [np.zeros((0, 2), dtype=np.int32)], [], 0
        for s, low, high in runs:
            pages.append(np.stack([np.full(high - low, s), np.arange(low, high)], axis=1).astype(np.int32))
            tiles.append(_tiles(batch, s, low, high, slot, group, rows, window))
            slot += high - low
        all_tiles = np.concatenate(tiles)
        # the deepest first: no tile begins when all others are done
        order = np.argsort(all_tiles[:, 3] - all_tiles[:, 4], kind="stable")
        arrays += [np.concatenate(pages), all_tiles[order]]
    return arrays


def _runs(batch: BatchLayout, group: int, window: int, most: int) -> list[list[tuple[int, int, int]]]:
    """Sequence, first page and the one after the last, for each piece of up to ``most`` pages."""
    pieces: list[list[tuple[int, int, int]]] = []
    room = 0
    for s in prompts(batch, group):
        start, count = int(batch.starts[s]), int(batch.counts[s])
        low, high = _oldest(start, window), (start + count - 1) // PAGE_TOKENS
        while True:
            if not pieces or (high - low > room and room < most):
                pieces.append([])
                room = most
            taken = min(high - low, room)
            pieces[-1].append((s, low, low + taken))
            low, room = low + taken, room - taken
            if low == high:
                break
    return pieces


def _tiles(batch: BatchLayout, s: int, low: int, high: int, slot: int, group: int, rows: int, window: int) -> Ints:
    """The tiles of ``s`` that see any of the pages ``low`` to ``high - 1``; where these are its first, also those that
    see no page at all."""
    start, end = int(batch.starts[s]), int(batch.starts[s] + batch.counts[s])
    tiles = []
    for page in range(start // PAGE_TOKENS, -(-end // PAGE_TOKENS)):
        first, stop = (min(max(p * PAGE_TOKENS, start), end) - start for p in (page, page + 1))
        for at in range(first * group, stop * group, rows):
            oldest = min(_oldest(start + at // group, window), page)
            seen = max(oldest, low), min(page, high)
            if seen[0] < seen[1] or (oldest == page and low == _oldest(start, window)):
                flags = int(seen[0] == oldest), int(seen[1] == page)
                if seen[0] >= seen[1]:
                    seen, flags = (low, low), (1, 1)
                tiles.append((s, at, min(rows, stop * group - at), *seen, slot + seen[0] - low, *flags))
    return np.array(tiles, dtype=np.int32).reshape(-1, 8)


def _oldest(position: int, window: int) -> int:
    """The first page that a query at ``position`` sees anything of."""
    return max(position - window + 1, 0) // PAGE_TOKENS if window else 0
