"""The pool that one or more caches share, and the parts of a step that its kernels run."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.codecs import PoolLayout
from kvbits.config import parse_bytes
from kvbits.engine.config import EngineConfig
from kvbits.engine.setup import pages_of, policy_of
from kvbits.kernels import Backend, BatchLayout
from kvbits.models import LoadedModel
from kvbits.pages import PageManager, SequencePages
from kvbits.pool import PagedPool

_MAX_FRAMES = 1 << 18
"""Frames that are reserved when nobody says how much: millions of tokens, and a free list of a few milliseconds."""

_SHARE = 4
"""One part in so many of the free memory is reserved when nobody says how much."""


@dataclass(frozen=True)
class Part:
    """One kernel call of a step: ``rows`` ``int64 [n]`` of the step's ``batch * tokens`` rows (``None``: all)."""

    forward: Forward
    rows: Tensor | None


class Store:
    """Pool, page manager and kernels behind the caches of one model. Sequences of all caches have distinct ids.

    Caches that share a store may be used in several threads; whoever asks for pages, or runs kernels on them, holds
    ``lock``: pages may go to other frames to make room for another cache's.
    """

    def __init__(self, loaded: LoadedModel, dtype: str, memory: str | int | None, backend: Backend) -> None:
        config = EngineConfig(kv_cache_dtype=dtype, enable_prefix_caching=False)
        policy = policy_of(loaded, config, backend)
        freed = backend.layer_groups
        layout = PoolLayout.of(loaded.geometry, policy, freed)
        size = _spare_memory(layout, loaded.device) if memory is None else parse_bytes(memory)
        self.backend = backend
        with torch.inference_mode(False):  # or pages could not be copied outside of it
            self.pool = PagedPool(loaded.geometry, policy, size, device=loaded.device, free_windows=freed)
        self.pages: PageManager = pages_of(self.pool, loaded, config)
        self.lock = threading.RLock()  # again in one thread: a cache may be collected, and cleared, at any time
        self._next = 0

    def open(self) -> int:
        """A new, empty sequence."""
        self._next += 1
        self.pages.open(self._next, [])
        return self._next

    def fork(self, sequence: int) -> int:
        """A copy of ``sequence`` that shares all its pages; whoever writes to the open one first copies it."""
        self._next += 1
        self.pages.fork(sequence, self._next)
        return self._next

    def part(self, slices: list[SequencePages], rows: Tensor | None) -> Part:
        """The kernel call for ``slices``."""
        return Part(Forward(self.pool, self.backend, BatchLayout.of(slices)), rows)

    def copy_pages(self) -> None:
        """Copy the open pages that are about to be written and were shared."""
        for source, target in self.pages.take_copies():
            self.pool.copy(source, target)


def _spare_memory(layout: PoolLayout, device: torch.device) -> int:
    """Bytes to reserve: address space on the CPU, where only frames that are used get memory; all of it on a GPU."""
    free = psutil.virtual_memory().available if device.type == "cpu" else _module(device).mem_get_info(device)[0]
    return int(min(free // _SHARE, layout.bytes_of(_MAX_FRAMES)))


def _module(device: torch.device) -> Any:
    """``torch.cuda`` or its like."""
    return torch.get_device_module(device)
