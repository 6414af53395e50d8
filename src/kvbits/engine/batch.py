"""The arrays of one step: token ids, positions, and which rows belong to which sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvbits.kernels import BatchLayout
from kvbits.pages import PageManager


@dataclass(frozen=True)
class Piece:
    """``tokens`` of sequence ``seq_id`` to store after its ``start`` stored ones; logits for the last ``outputs``."""

    seq_id: int
    start: int
    tokens: Sequence[int]
    outputs: int


@dataclass(frozen=True)
class StepBatch:
    """Inputs of the model for one step.

    ``input_ids``, ``positions`` ``int64 [rows]``; ``logits_rows`` ``int64 [outputs]``, the rows that need logits, piece
    after piece.
    """

    input_ids: Tensor
    positions: Tensor
    layout: BatchLayout
    logits_rows: Tensor


def build(pieces: Sequence[Piece], pages: PageManager, draft: bool = False) -> StepBatch:
    """Pack ``pieces``, whose frames are reserved, into one batch; ``draft``: sealed pages are read as drafts."""
    rows = sum(len(p.tokens) for p in pieces)
    ids = np.empty(rows, dtype=np.int64)
    positions = np.empty(rows, dtype=np.int64)
    wanted = np.empty(sum(p.outputs for p in pieces), dtype=np.int64)
    slices = []
    row = out = 0
    for piece in pieces:
        count = len(piece.tokens)
        ids[row : row + count] = piece.tokens
        positions[row : row + count] = np.arange(piece.start, piece.start + count)
        row += count
        wanted[out : out + piece.outputs] = np.arange(row - piece.outputs, row)
        out += piece.outputs
        part = pages.slice(piece.seq_id)
        assert (part.start, part.count) == (piece.start, count), (part, piece.start, count)
        slices.append(part)
    return StepBatch(
        torch.from_numpy(ids), torch.from_numpy(positions), BatchLayout.of(slices, draft), torch.from_numpy(wanted)
    )
