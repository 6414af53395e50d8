"""Errors that a user of kvbits can meet.

Each message names the thing, its value and the choices. Wrong internal logic is an ``assert``, never one of these.
"""

from __future__ import annotations


class KVBitsError(Exception):
    """Base of every error that kvbits raises on purpose."""


class ConfigError(KVBitsError):
    """An option, a policy or an input file is wrong; the caller can mend it."""


class UnsupportedError(KVBitsError):
    """The model or the combination asked for needs something that kvbits cannot do."""


class OutOfPages(KVBitsError):
    """The pool has too few free frames for what was asked."""


class RequestError(KVBitsError):
    """One request cannot be served (too long, bad sampling parameters); others go on. ``param`` names the field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt, or a prompt and the answer wanted, is longer than the context or the pool."""


class CacheError(KVBitsError, ValueError):
    """A cached sequence was asked for something that its pages cannot do (unknown id, truncation of a sealed page)."""
