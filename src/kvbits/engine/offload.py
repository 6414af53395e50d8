"""Where pages go that the pool gives up: frames copied to host memory or to a file, with a checksum of each.

:class:`kvbits.pages.SecondTier` decides what is kept; this module moves the bytes. Files are written with ``pwrite``
and not mapped: a full disk is then an error of the call and not a signal that ends the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from kvbits.engine.config import EngineConfig
from kvbits.errors import ConfigError
from kvbits.memory import check_disk, check_host
from kvbits.pages import SecondTier
from kvbits.pool import PagedPool

MAGIC = b"kvbits offload tier 1\n"
"""How a file begins that this module may write over."""

_HEADER = 4096


class Store(Protocol):
    """Bytes by position; both raise ``OSError``."""

    def write(self, start: int, data: memoryview) -> None:
        """Store ``data`` at byte ``start``."""

    def read(self, start: int, into: memoryview) -> None:
        """Fill ``into`` from byte ``start``."""


class MemoryStore:
    """Host memory, which the operating system commits as it is written."""

    def __init__(self, size: int) -> None:
        self._block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def write(self, start: int, data: memoryview) -> None:
        self._block[start : start + len(data)] = data

    def read(self, start: int, into: memoryview) -> None:
        into[:] = self._block[start : start + len(into)]


class FileStore:
    """A file that grows as it is written, removed when the store is. One process at a time uses it."""

    def __init__(self, path: Path) -> None:
        """``path`` is a file to make, one that an earlier process left behind, or a directory for a nameless file.

        Raises ``ConfigError`` when it cannot be written, is in use, or holds something else.
        """
        try:
            self._fd = _nameless(path) if path.is_dir() else _named(path)
        except OSError as error:
            raise ConfigError(f"cannot offload to '{path}': {error.strerror or error}") from error
        weakref.finalize(self, _close, self._fd, None if path.is_dir() else path.absolute())

    def write(self, start: int, data: memoryview) -> None:
        place = _HEADER + start
        while data:
            done = os.pwrite(self._fd, data, place)
            data, place = data[done:], place + done

    def read(self, start: int, into: memoryview) -> None:
        place = _HEADER + start
        while into:
            done = os.preadv(self._fd, [into], place)
            if done == 0:
                raise OSError(f"the offload file ends at byte {place}")
            into, place = into[done:], place + done


class FrameMover:
    """Copies frames and states of ``pool`` to a store and back, on whatever device the pool lies."""

    def __init__(self, pool: PagedPool, store: Store) -> None:
        self._buffer = pool.buffer
        self._size = pool.layout.frame_bytes
        self._store = store
        self._staging = np.empty(self._size, dtype=np.uint8)
        self._states = pool.states
        self._staged = np.empty(0 if pool.states is None else pool.states.slot_bytes, dtype=np.uint8)

    def save(self, frame: int, slot: int) -> bytes:
        data = self._buffer[frame].cpu().numpy().data
        self._store.write(slot * self._size, data)
        return _checksum(data)

    def load(self, slot: int, frame: int, checksum: bytes) -> bool:
        data = self._staging.data
        self._store.read(slot * self._size, data)
        if _checksum(data) != checksum:
            return False
        self._buffer[frame].copy_(torch.from_numpy(self._staging))
        return True

    def save_state(self, state: int, slots: Sequence[int]) -> bytes:
        assert self._states is not None
        data = self._states.raw(state).cpu().numpy().data
        for slot, start in self._parts(slots):
            self._store.write(slot * self._size, data[start : start + self._size])
        return _checksum(data)

    def stage_state(self, slots: Sequence[int], checksum: bytes) -> bool:
        for slot, start in self._parts(slots):
            self._store.read(slot * self._size, self._staged.data[start : start + self._size])
        return _checksum(self._staged.data) == checksum

    def load_state(self, state: int) -> None:
        assert self._states is not None
        self._states.raw(state).copy_(torch.from_numpy(self._staged))

    def _parts(self, slots: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Each slot, and where its bytes begin in a state."""
        return zip(slots, range(0, len(self._staged), self._size), strict=True)


def tier_of(pool: PagedPool, config: EngineConfig) -> SecondTier | None:
    """The second tier that ``config`` asks for. Raises ``ConfigError`` when it cannot be had."""
    size = config.kv_offload_size
    if size is None:
        return None
    slots, first = pool.layout.frames_in(size), pool.layout.first_frames
    state_slots = 0 if pool.states is None else -(-pool.states.slot_bytes // pool.layout.frame_bytes)
    if slots < first + state_slots:
        what = "one page and a sequence's states need" if state_slots else "one page needs"
        raise ConfigError(f"kv_offload_size is {size} bytes; {what} {pool.layout.bytes_of(first + state_slots)}")
    path = config.kv_offload_path
    taken = pool.layout.bytes_of(slots)
    store: Store
    if path is None:
        check_host({"kv_offload_size": taken})
        store = MemoryStore(taken)
    else:
        store = FileStore(Path(path))
        check_disk("kv_offload_size", taken, Path(path))
    return SecondTier(slots, FrameMover(pool, store), state_slots)


def _checksum(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def _nameless(folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return os.dup(file.fileno())


def _named(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"cannot offload to '{path}': another process uses it") from None
        if os.fstat(fd).st_size and os.pread(fd, len(MAGIC), 0) != MAGIC:
            raise ConfigError(f"cannot offload to '{path}': the file exists and is not an offload file")
        os.ftruncate(fd, 0)
        os.pwrite(fd, MAGIC, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _close(fd: int, path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)
    os.close(fd)
