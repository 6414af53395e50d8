"""Text files and the windows that an evaluation cuts them into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvbits.errors import ConfigError


def read_text(path: Path) -> str:
    """The file's text, line ends as they are. Raises ``ConfigError`` when it is unreadable, empty or no UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the text file '{path}': {error.strerror or error}") from error
    if not data.strip():
        raise ConfigError(f"the text file '{path}' is empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the text file '{path}' is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error


def check_text(texts: Sequence[str], context: int, count: int) -> None:
    """Raise ``ConfigError`` for texts that cannot have ``count`` windows: no token is shorter than a byte. No model is
    needed for that."""
    sizes = [len(text.encode()) for text in texts]
    if sum(size // context for size in sizes) < count:
        raise ConfigError(
            f"the text has {sum(sizes):,} bytes, and so at most as many tokens; {count} windows of {context} need "
            f"{context * count:,}"
        )


def cut_windows(tokens: Sequence[int], context: int, count: int) -> list[list[int]]:
    """The first ``count`` windows of ``context`` tokens, one after another, not overlapping.

    Raises ``ConfigError`` when the text has too few tokens or a number is out of range.
    """
    if context < 4:
        raise ConfigError(f"a context of {context} tokens leaves nothing to score; it must be at least 4")
    if count < 1:
        raise ConfigError(f"{count} windows asked for; it must be at least 1")
    if len(tokens) < context * count:
        raise ConfigError(
            f"the text has {len(tokens)} tokens; {count} windows of {context} need {context * count}"
            f" (it holds {len(tokens) // context})"
        )
    return [list(tokens[i * context : (i + 1) * context]) for i in range(count)]
