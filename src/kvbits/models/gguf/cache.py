"""Converted tokenizers in the user's cache directory, one file each; without a place to write all works as well."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import tokenizers

_VERSION = 1
"""Grows when a conversion gives another tokenizer for the same file."""


def directory() -> Path:
    """``$XDG_CACHE_HOME/kvbits/tokenizers``, by default ``~/.cache/kvbits/tokenizers`` (XDG Base Directory 0.8)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "kvbits" / "tokenizers"


def load(digest: str) -> str | None:
    """What was stored for ``digest`` by this version; ``None`` without it."""
    try:
        return _file(digest).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RuntimeError):
        return None


def store(digest: str, text: str) -> None:
    """Keep ``text`` for ``digest``, whole or not at all; a directory that cannot be written is no error."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _file(digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as part:
                part.write(text)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _file(digest: str) -> Path:
    return directory() / f"{digest[:40]}-{_VERSION}-{tokenizers.__version__}.json"
