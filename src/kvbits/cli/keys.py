"""API keys on the command line, in a file, and in the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvbits.cli.session import note

if TYPE_CHECKING:
    from kvbits.server.keys import ApiKey

VARIABLE = "KVBITS_API_KEY"
"""Holds a key where neither an option nor a file names one; command lines are seen by every user of a machine."""


def server_keys(given: list[str] | None, path: Path | None) -> tuple[ApiKey, ...]:
    """The keys that a server takes. Raises ``ConfigError`` for a wrong file or what is no key."""
    from kvbits.server.keys import ApiKey

    keys = {secret: ApiKey(secret) for secret in given or ()}
    if path is not None:
        keys |= {key.secret: key for key in _read(path)}
    if given is None and path is None and VARIABLE in os.environ:
        return (ApiKey(os.environ[VARIABLE]),)
    return tuple(keys.values())


def client_key(given: str | None, path: Path | None) -> str | None:
    """The key that a client sends: the option's, the first of the file, or the environment's."""
    if given is None and path is not None:
        return _read(path)[0].secret
    return os.environ.get(VARIABLE) if given is None else given


def _read(path: Path) -> tuple[ApiKey, ...]:
    from kvbits.server.keys import read_keys, readable_by_others

    keys = read_keys(path)
    if readable_by_others(path):
        note(f"kvbits: warning: every user of this machine can read the API keys in '{path}'; chmod 600 helps")
    return keys
