"""Where a command's results go besides the terminal."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbits.errors import ConfigError
from kvbits.files import write_text


class JsonFile:
    """A results file that is opened before the work starts, so that a bad path fails at once and not after minutes."""

    def __init__(self, path: Path | None) -> None:
        """Raises ``ConfigError`` when ``path`` cannot be written."""
        self.path = path
        if path is not None:
            writable(path)

    def write(self, results: Mapping[str, Any]) -> None:
        """Write ``results`` as indented JSON, if a path was given."""
        if self.path is not None:
            write_text(self.path, json.dumps(results, indent=2) + "\n")


def writable(path: Path) -> None:
    """Raise ``ConfigError`` unless ``path`` can be opened for writing; what it holds stays as it is."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"cannot write to '{path}': {error.strerror or error}") from error
    if not existed:
        path.unlink()


def readable(path: Path) -> None:
    """Raise ``ConfigError`` unless ``path`` is a file that can be opened."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"cannot read '{path}': {error.strerror or error}") from error


def folder(path: Path) -> Path:
    """``path`` as an existing directory. Raises ``ConfigError`` when it cannot be made or written to."""
    can_be_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the directory '{path}': {error.strerror or error}") from error
    return path


def can_be_folder(path: Path) -> None:
    """Raise ``ConfigError`` where :func:`folder` would; nothing is made."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigError(f"cannot make the directory '{path}': '{there}' is a file")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to the directory '{there}': {error.strerror or error}") from error
