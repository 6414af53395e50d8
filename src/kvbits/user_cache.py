"""Small files that kvbits keeps for next time in the user's cache directory, whole or not at all. No torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/kvbits/NAME``, by default ``~/.cache/kvbits/NAME`` (XDG Base Directory 0.8).

    Raises ``OSError`` where there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return root / "kvbits" / name


def write(file: Path, content: str | bytes) -> None:
    """Write ``content`` beside ``file`` and rename it; raises ``OSError`` and leaves nothing half-written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as part:
            part.write(content.encode() if isinstance(content, str) else content)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
