"""Converted tokenizers in the user's cache directory, one file each; without a place to write all works as well."""

from __future__ import annotations

import contextlib
from pathlib import Path

import tokenizers

from kvbits import user_cache

_VERSION = 1
"""Grows when a conversion gives another tokenizer for the same file."""


def directory() -> Path:
    """Where they lie; raises as :func:`kvbits.user_cache.folder`."""
    return user_cache.folder("tokenizers")


def load(digest: str) -> str | None:
    """What was stored for ``digest`` by this version; ``None`` without it."""
    try:
        return _file(digest).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def store(digest: str, text: str) -> None:
    """Keep ``text`` for ``digest``, whole or not at all; a directory that cannot be written is no error."""
    with contextlib.suppress(OSError):
        user_cache.write(_file(digest), text)


def _file(digest: str) -> Path:
    return directory() / f"{digest[:40]}-{_VERSION}-{tokenizers.__version__}.json"
