"""The header of a GGUF file, parsed once over a memory map.

The format is that of ggml's ``docs/gguf.md``, versions 2 and 3, little endian. Arrays stay in the map until they are
asked for: a vocabulary of 150,000 strings costs a walk over its lengths and nothing else. (The ``gguf`` package's own
reader makes several array objects of every string: 14 s for such a file.)
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kvbits.errors import ConfigError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 1024
_LENGTH = struct.Struct("<Q")
_PAGE = mmap.PAGESIZE

Value = Any
"""A number, a ``bool``, a ``str``, a numeric array or :class:`Strings`."""


class Strings(Sequence[str]):
    """An array of strings that is still in the map; iterating decodes it."""

    def __init__(self, data: mmap.mmap, start: int, count: int) -> None:
        self._data, self._start, self._count = data, start, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        at, data, unpack = self._start, self._data, _LENGTH.unpack_from
        for _ in range(self._count):
            begin = at + 8
            at = begin + unpack(data, at)[0]
            yield data[begin:at].decode("utf-8", "replace")

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return list(self)[index]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as it lies in its file; ``shape`` in torch's order, ``size`` in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    file: Part
    start: int
    size: int

    def rows(self) -> np.ndarray:
        """The bytes, ``uint8 [rows, bytes a row]``, in the map; a vector is one row."""
        count = int(np.prod(self.shape[:-1], dtype=np.int64))
        flat = np.frombuffer(self.file.data, np.uint8, self.size, self.start)
        return flat.reshape(count, -1) if self.size else flat.reshape(count, 0)

    def release(self, first: int, last: int) -> None:
        """Tell the system that the pages of these rows need not stay in memory; they are read again when needed."""
        row = self.size // max(1, int(np.prod(self.shape[:-1], dtype=np.int64)))
        begin = -(-(self.start + first * row) // _PAGE) * _PAGE
        end = (self.start + last * row) // _PAGE * _PAGE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self.file.data.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class Part:
    """One GGUF file: ``metadata`` by key, ``tensors`` by name, ``digest`` of the metadata (64 hex digits).

    Raises ``ConfigError`` naming the file for one that is cut off, of another version or with values that cannot be,
    and naming the tensor for one of an unknown type or beyond the end of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the GGUF file '{path}': {error}") from error
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._parse()
        except (struct.error, IndexError, OverflowError) as error:
            raise ConfigError(f"cannot read the GGUF file '{path}': it ends inside its header") from error

    def _parse(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ConfigError(f"'{self.path}' is not a GGUF file: it starts with {self.data[:4]!r}")
        version, tensors, pairs = struct.unpack_from("<IQQ", self.data, 4)
        if version not in _VERSIONS:
            raise ConfigError(
                f"cannot read the GGUF file '{self.path}': it is of version {version}; kvbits reads "
                f"{' and '.join(map(str, _VERSIONS))}, little endian"
            )
        at = 24
        for _ in range(pairs):
            key, at = self._name(at, "key")
            (kind,) = struct.unpack_from("<I", self.data, at)
            self.metadata[key], at = self._value(key, kind, at + 4)
        self.digest = hashlib.sha256(memoryview(self.data)[:at]).hexdigest()
        found = []
        for _ in range(tensors):
            entry, at = self._tensor(at)
            found.append(entry)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._wrong("general.alignment", alignment)
        base = -(-at // alignment) * alignment
        for name, shape, kind, offset in found:
            self._place(name, shape, kind, base + offset)

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = _LENGTH.unpack_from(self.data, at)
        end = at + 8 + length
        if end > len(self.data):
            raise IndexError(end)
        return self.data[at + 8 : end].decode("utf-8", "replace"), end

    def _name(self, at: int, what: str) -> tuple[str, int]:
        (length,) = _LENGTH.unpack_from(self.data, at)
        name, end = self._string(at) if length <= _LONGEST_NAME else ("", at)
        if not name or not name.isprintable():
            raise ConfigError(f"cannot read the GGUF file '{self.path}': at byte {at} there is no {what}")
        return name, end

    def _value(self, key: str, kind: int, at: int) -> tuple[Value, int]:
        if kind in _SCALARS:
            (value,) = struct.unpack_from(_SCALARS[kind], self.data, at)
            return value, at + struct.calcsize(_SCALARS[kind])
        if kind == _STRING:
            return self._string(at)
        if kind != _ARRAY:
            raise ConfigError(f"cannot read the GGUF file '{self.path}': the value of {key} is of unknown type {kind}")
        inner, count = struct.unpack_from("<IQ", self.data, at)
        at += 12
        if inner == _STRING:
            return Strings(self.data, at, count), self._behind_strings(at, count)
        if inner not in _SCALARS:
            raise ConfigError(f"cannot read the GGUF file '{self.path}': {key} is an array of type {inner}")
        dtype = np.dtype(_SCALARS[inner])
        if at + count * dtype.itemsize > len(self.data):
            raise IndexError(count)
        return np.frombuffer(self.data, dtype, count, at), at + count * dtype.itemsize

    def _behind_strings(self, at: int, count: int) -> int:
        data, unpack = self.data, _LENGTH.unpack_from
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        if at > len(data):
            raise IndexError(at)
        return at

    def _tensor(self, at: int) -> tuple[tuple[str, tuple[int, ...], int, int], int]:
        name, at = self._name(at, "tensor's name")
        (dimensions,) = struct.unpack_from("<I", self.data, at)
        if dimensions > _MOST_DIMENSIONS:
            raise ConfigError(f"cannot read the GGUF file '{self.path}': tensor {name} has {dimensions} dimensions")
        shape = struct.unpack_from(f"<{dimensions}Q", self.data, at + 4)
        kind, offset = struct.unpack_from("<IQ", self.data, at + 4 + 8 * dimensions)
        return (name, tuple(reversed(shape)), kind, offset), at + 16 + 8 * dimensions

    def _place(self, name: str, shape: tuple[int, ...], number: int, start: int) -> None:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ConfigError(
                f"cannot read the GGUF file '{self.path}': tensor {name} is of the unknown type {number}"
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        elements = 1
        for length in shape:
            elements *= length
        if not shape or shape[-1] % block:
            raise ConfigError(
                f"cannot read the GGUF file '{self.path}': rows of tensor {name} have the shape {list(shape)}, no "
                f"multiple of {kind.name}'s blocks of {block}"
            )
        bytes_needed = elements // block * size
        if start + bytes_needed > len(self.data):
            raise ConfigError(
                f"cannot read the GGUF file '{self.path}': it is cut off; tensor {name} ends at byte "
                f"{start + bytes_needed}, the file at {len(self.data)}"
            )
        if name in self.tensors:
            raise ConfigError(f"cannot read the GGUF file '{self.path}': tensor {name} is there twice")
        self.tensors[name] = TensorInfo(name, shape, kind, self, start, bytes_needed)

    def _wrong(self, key: str, value: object) -> ConfigError:
        return ConfigError(f"cannot read the GGUF file '{self.path}': {key} is {value!r}")
