"""Whether all files of a directory of safetensors are there and whole, by reading their headers only."""

from __future__ import annotations

import json
from pathlib import Path

from kvbits.errors import ConfigError

_INDEX = "model.safetensors.index.json"
_LENGTH = 8


def check_shards(directory: Path) -> None:
    """Raises ``ConfigError`` naming a file that the index of ``directory`` lists and that is missing or cut off.

    A path that is no directory, such as the name of a model in the hub's cache, is left to transformers.
    """
    if not directory.is_dir():
        return
    index = directory / _INDEX
    if index.is_file():
        for name in _listed(index):
            if not (directory / name).is_file():
                raise ConfigError(f"the model directory '{directory}' has no {name}, which {_INDEX} lists")
    for file in sorted(directory.glob("*.safetensors")):
        _check(file)


def _listed(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in names})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read '{index}': {error}") from error


def _check(file: Path) -> None:
    """The header says where the last tensor ends (format of the ``safetensors`` library)."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH), "little")
            if _LENGTH + length > size:
                raise ConfigError(f"cannot read the weights of '{file}': it is cut off inside its header")
            header = json.loads(stream.read(length))
        ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the weights of '{file}': {error}") from error
    for name, end in ends.items():
        if _LENGTH + length + end > size:
            raise ConfigError(
                f"cannot read the weights of '{file}': it is cut off; tensor {name} ends at byte "
                f"{_LENGTH + length + end}, the file at {size}"
            )
