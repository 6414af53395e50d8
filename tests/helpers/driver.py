"""Frames for sequences without a page manager: each sequence takes the next free frames and never gives them back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.codecs import PoolLayout, parse_policy
from kvbits.config import PAGE_TOKENS, ModelGeometry
from kvbits.kernels import Backend, BatchLayout, SequencePages
from kvbits.models import LoadedModel
from kvbits.pool import PagedPool


class Frames:
    """A pool whose every byte starts as 0xFF (a NaN in every parameter), and the frames of its sequences.

    Frames are handed out in a shuffled order: a kernel that follows anything but the page table reads NaN.
    """

    def __init__(self, geometry: ModelGeometry, dtype: str, frames: int = 64, seed: int = 0) -> None:
        policy = parse_policy(dtype, geometry.num_layers)
        probe = PoolLayout.of(geometry, policy, free_windows=False)
        self.pool = PagedPool(geometry, policy, frames * probe.frame_bytes, free_windows=False)
        self.pool.buffer.fill_(0xFF)
        order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed))
        self._free = order.tolist()
        self._open: dict[int, list[int]] = {}
        self.sealed: dict[int, list[int]] = {}
        self.sink: dict[int, list[int]] = {}
        self.length: dict[int, int] = {}

    def slice(self, sequence: int, count: int) -> SequencePages:
        """The next ``count`` tokens of ``sequence``."""
        if sequence not in self._open:
            self._open[sequence] = [self._free.pop() for _ in range(self.pool.layout.open.frames)]
            self.sealed[sequence], self.length[sequence] = [], 0
        start = self.length[sequence]
        self.length[sequence] += count
        full = self.length[sequence] // PAGE_TOKENS
        if self.pool.layout.sink and full and sequence not in self.sink:
            self.sink[sequence] = [self._free.pop() for _ in range(self.pool.layout.sink.frames)]
        while len(self.sealed[sequence]) < full - (sequence in self.sink):
            self.sealed[sequence].append(self._free.pop())
        frames = self._open[sequence]
        return SequencePages(
            start, count, list(self.sealed[sequence]), frames, frames, list(self.sink.get(sequence, []))
        )

    def page_bytes(self, sequence: int) -> Tensor:
        """The sealed pages of ``sequence``, ``uint8 [pages, frame_bytes]``."""
        return self.pool.buffer[torch.tensor(self.sealed[sequence], dtype=torch.long)].clone()

    def open_bytes(self, sequence: int) -> Tensor:
        """The open page of ``sequence``, ``uint8 [open frames, frame_bytes]``."""
        return self.pool.buffer[torch.tensor(self._open[sequence])].clone()


class Driver:
    """Feeds token lists to a model on a pool; sequences of one step are packed."""

    def __init__(self, loaded: LoadedModel, dtype: str, backend: Backend, frames: int = 64) -> None:
        self.loaded, self.backend = loaded, backend
        self.frames = Frames(loaded.geometry, dtype, frames)

    def step(self, tokens: dict[int, Sequence[int]]) -> dict[int, Tensor]:
        """Append each sequence's ``tokens``; returns the logits of all of them, ``float32 [count, vocab]``."""
        slices = [self.frames.slice(s, len(t)) for s, t in tokens.items()]
        ids = torch.tensor([t for part in tokens.values() for t in part])
        positions = torch.cat([torch.arange(s.start, s.start + s.count) for s in slices])
        step = Forward(self.frames.pool, self.backend, BatchLayout.of(slices))
        logits = self.loaded.forward(ids, positions, step, torch.arange(len(ids)))
        return dict(zip(tokens, logits.split([s.count for s in slices]), strict=True))
