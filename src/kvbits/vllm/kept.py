"""Where chunks that left vLLM are kept: in memory or in a directory, the least recently used given up. No vLLM.

The index belongs to the caller's thread; the bytes are read and written by any.
"""

from __future__ import annotations

import contextlib
import logging
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from kvbits.errors import CacheError, ConfigError

log = logging.getLogger(__name__)

_SUFFIX = ".kvbits"


class Kept(ABC):
    """At most ``capacity`` bytes by key; a key's bytes are put with :meth:`write`, then entered with :meth:`add`."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.nbytes = capacity, 0
        self._sizes: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def touch(self, keys: Collection[bytes]) -> None:
        """These were used."""
        for key in keys:
            if key in self._sizes:
                self._sizes.move_to_end(key)

    def add(self, key: bytes, size: int) -> None:
        """``key``'s bytes are there; what was used longest ago makes room."""
        self.nbytes += size - self._sizes.pop(key, 0)
        self._sizes[key] = size
        while self.nbytes > self.capacity:
            self.drop(next(iter(self._sizes)))

    def drop(self, key: bytes) -> None:
        """Forget ``key``, if it is known."""
        self.nbytes -= self._sizes.pop(key, 0)
        self._erase(key)

    @abstractmethod
    def write(self, key: bytes, data: Tensor) -> None:
        """Keep ``data`` ``uint8 [bytes]``. Raises ``OSError``."""

    @abstractmethod
    def read(self, key: bytes) -> Tensor:
        """``uint8 [bytes]``. Raises ``CacheError`` or ``OSError`` where they are gone."""

    @abstractmethod
    def _erase(self, key: bytes) -> None: ...


class KeptInMemory(Kept):
    """In this process."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._data: dict[bytes, Tensor] = {}

    def write(self, key: bytes, data: Tensor) -> None:
        self._data[key] = data

    def read(self, key: bytes) -> Tensor:
        found = self._data.get(key)
        if found is None:
            raise CacheError("a chunk was given up before it was read")
        return found

    def _erase(self, key: bytes) -> None:
        self._data.pop(key, None)


class KeptInFiles(Kept):
    """A file for each key in ``directory``; those that are there already count. A chunk has its own checksum.

    Raises ``ConfigError`` where nothing can be written there.
    """

    def __init__(self, capacity: int, directory: Path) -> None:
        super().__init__(capacity)
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            found = [(e.stat(), e.name) for e in os.scandir(directory) if e.name.endswith(_SUFFIX)]
        except OSError as error:
            raise ConfigError(f"chunks cannot be kept in '{directory}': {error}") from error
        if not os.access(directory, os.W_OK):
            raise ConfigError(f"chunks cannot be kept in '{directory}': it is not writable")
        for stat, name in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
            with contextlib.suppress(ValueError):
                self.add(bytes.fromhex(name.removesuffix(_SUFFIX)), stat.st_size)

    def write(self, key: bytes, data: Tensor) -> None:
        path = self._path(key)
        beside = path.with_suffix(f".{os.getpid()}")
        try:
            beside.write_bytes(data.numpy().data)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise

    def read(self, key: bytes) -> Tensor:
        with self._path(key).open("rb", buffering=0) as file:
            whole = bytearray(os.fstat(file.fileno()).st_size)
            whole = whole[: file.readinto(whole)]
        if not whole:
            raise CacheError(f"the chunk in '{self._path(key)}' is empty")
        return torch.frombuffer(whole, dtype=torch.uint8)

    def _erase(self, key: bytes) -> None:
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            log.warning("A chunk that is no longer needed stays: %s", error)

    def _path(self, key: bytes) -> Path:
        return self._directory / f"{key.hex()}{_SUFFIX}"
