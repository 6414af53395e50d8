"""The tensors of a directory of safetensors, by the files' headers only: torch is not imported.

The format is that of the ``safetensors`` library: eight bytes of length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbits.errors import ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LENGTH = 8
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in its file; ``dtype`` by the format's name, ``start`` and ``size`` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size: int


def read_headers(directory: Path) -> dict[str, Stored]:
    """Every tensor of the model in ``directory`` by its name, out of one file or of those that its index lists.

    Raises ``ConfigError`` naming a file that is missing, cut off or none of this format, or a tensor that is not in the
    file in which the index has it or whose bytes do not fit its shape.
    """
    if (directory / SINGLE).is_file():
        return _read(directory / SINGLE)
    index = directory / INDEX
    if not index.is_file():
        raise ConfigError(f"the model directory '{directory}' has neither {SINGLE} nor {INDEX}")
    where = _listed(index)
    files = sorted(set(where.values()))
    for name in files:
        if not (directory / name).is_file():
            raise ConfigError(f"the model directory '{directory}' has no {name}, which {INDEX} lists")
    found: dict[str, Stored] = {}
    for name in files:
        found |= _read(directory / name)
    for key, name in where.items():
        if key not in found or found[key].path.name != Path(name).name:
            raise ConfigError(f"'{directory / name}' has no tensor {key}, which {INDEX} has there")
    return found


def file_names(index: Path) -> Iterable[str]:
    """The files that an index lists, sorted; raises ``ConfigError`` for what is no index."""
    return sorted(set(_listed(index).values()))


def _listed(index: Path) -> dict[str, str]:
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        return {str(key): str(name) for key, name in entries}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read '{index}': {error}") from error


def _read(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH), "little")
            if _LENGTH + length > size:
                raise ConfigError(f"cannot read the weights of '{path}': it is cut off inside its header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = [_stored(key, entry, path, _LENGTH + length) for key, entry in header.items()]
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the weights of '{path}': {error}") from error
    for entry in entries:
        if entry.start + entry.size > size:
            raise ConfigError(
                f"cannot read the weights of '{path}': it is cut off; tensor {entry.name} ends at byte "
                f"{entry.start + entry.size}, the file at {size}"
            )
    return {entry.name: entry for entry in entries}


def _stored(name: str, entry: dict[str, Any], path: Path, base: int) -> Stored:
    dtype, shape = str(entry["dtype"]), tuple(int(length) for length in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if dtype not in _SIZES:
        raise ConfigError(f"cannot read the weights of '{path}': tensor {name} is of the unknown type {dtype}")
    if begin < 0 or min(shape, default=0) < 0 or end - begin != math.prod(shape) * _SIZES[dtype]:
        raise ConfigError(
            f"cannot read the weights of '{path}': tensor {name} has the shape {list(shape)} and the type {dtype}, but "
            f"{end - begin} bytes"
        )
    return Stored(name, dtype, shape, path, base + begin, end - begin)
