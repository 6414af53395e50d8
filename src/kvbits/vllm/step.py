"""A step's metadata, from vLLM's terms into kvbits' :class:`~kvbits.kernels.BatchLayout`. Numpy and torch only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvbits.config import PAGE_TOKENS
from kvbits.kernels import BatchLayout

Ints = NDArray[np.int32]


class OpenTables(Protocol):
    """Who knows in which blocks the open pages of a step's requests lie."""

    def open_blocks(self, requests: Ints) -> Ints:
        """``int32 [parities, len(requests), open frames]``: for each of the step's rows ``requests``."""
        ...


@dataclass
class Step:
    """The requests of a step that have new tokens.

    ``requests`` ``int32 [S]``: which of vLLM's rows they are; ``starts``, ``counts`` ``int32 [S]``, ``rows`` ``int32 [S
    + 1]`` and ``sealed`` ``int32 [S, pages]`` as in :class:`~kvbits.kernels.BatchLayout`.
    """

    requests: Ints
    starts: Ints
    counts: Ints
    rows: Ints
    sealed: Ints
    _batch: BatchLayout | None = field(default=None, repr=False)

    @classmethod
    def of(cls, num_requests: int, query_start: Tensor, lengths: Tensor, blocks: Tensor) -> Step:
        """From ``query_start`` ``int32 [requests + 1]`` (first row of each), ``lengths`` ``int32 [requests]`` (tokens
        after this step) and the block table ``blocks`` ``int32 [requests, pages]``; from a GPU they are fetched."""
        rows = query_start[: num_requests + 1].numpy().astype(np.int32)
        counts = np.diff(rows)
        requests = np.flatnonzero(counts > 0).astype(np.int32)
        ends = lengths[:num_requests].cpu().numpy().astype(np.int32)[requests]
        pages = max(1, int((ends // PAGE_TOKENS).max(initial=0)))
        return cls(
            requests=requests,
            starts=ends - counts[requests],
            counts=np.ascontiguousarray(counts[requests]),
            # those without tokens take no rows, so what is left is packed as before
            rows=np.append(rows[requests], rows[-1]).astype(np.int32),
            sealed=np.ascontiguousarray(blocks[:, :pages].cpu().numpy()[requests].astype(np.int32)),
        )

    def batch(self, tables: OpenTables) -> BatchLayout:
        """What the kernels are told, made once for all layers that share this."""
        if self._batch is None:
            blocks = tables.open_blocks(self.requests)
            parities = len(blocks)
            at = np.arange(len(self.requests))
            first, last = self.starts // PAGE_TOKENS, (self.starts + self.counts) // PAGE_TOKENS
            self._batch = BatchLayout(
                starts=self.starts,
                counts=self.counts,
                rows=self.rows,
                sealed=self.sealed,
                head=np.ascontiguousarray(blocks[first % parities, at]),
                tail=np.ascontiguousarray(blocks[last % parities, at]),
                sink=np.zeros((len(at), 0), np.int32),
            )
        return self._batch
