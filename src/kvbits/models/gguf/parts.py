"""The names of the files of a model in several parts (``name-00001-of-00003.gguf``)."""

from __future__ import annotations

import re
from pathlib import Path

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that ``path`` belongs to by its name, the first one first; ``path`` itself for a whole."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    return [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]


def first_part(path: Path) -> Path:
    """The first of :func:`parts_of`."""
    return parts_of(path)[0]
