"""Files that are whole or not there: written beside their place and renamed. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvbits.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, beside ``path`` and with its ending; what is there at the end becomes ``path``.

    Whatever fails leaves ``path`` as it was. The mode is the old file's, or that of any new file. What is no regular
    file (``/dev/stdout``) is written to directly. Raises ``ConfigError`` naming ``path`` for an ``OSError``.
    """
    place = path.resolve() if path.is_symlink() else path
    try:
        if place.exists() and not place.is_file():
            yield place
            return
        beside = place.with_name(f".{place.stem}.{os.getpid()}.part{place.suffix}")
        try:
            beside.open("xb").close()
            mode = stat.S_IMODE((place if place.exists() else beside).stat().st_mode)
            yield beside
            # Some libraries make files that only their owner can read.
            beside.chmod(mode)
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write '{path}': {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, as :func:`replacing` does."""
    with replacing(path) as place:
        place.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data``, as :func:`replacing` does."""
    with replacing(path) as place:
        place.write_bytes(data)
