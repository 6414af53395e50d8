"""API keys: who asks, and what they may. Keys come from options, a file or the environment, and never show in a log."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvbits.errors import ConfigError

PERMISSIONS = ("priority", "operator")
"""``priority``: requests may set it. ``operator``: sees everybody's sessions on ``/kvbits/state``."""

_NAME = re.compile(r"name=([A-Za-z0-9._@-]{1,64})")


@dataclass(frozen=True)
class Client:
    """Who asks: all keys of one name, or one key without a name. ``id`` tells clients apart and is no secret."""

    id: str = ""
    name: str = ""
    permissions: frozenset[str] = frozenset()


ANYBODY = Client()
"""Whoever asks a server without keys."""


@dataclass(frozen=True)
class ApiKey:
    """A key, the name of whom it was given to, and what it permits. Raises ``ConfigError`` for what is no key."""

    secret: str = field(repr=False)
    name: str = ""
    permissions: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.secret or self.secret != self.secret.strip():
            raise ConfigError("an API key is empty or has blanks around it")

    @property
    def client(self) -> Client:
        """Whom the key stands for."""
        what = f"name:{self.name}" if self.name else f"key:{self.secret}"
        digest = hashlib.sha256(b"kvbits client\n" + what.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        return Client(digest, self.name, self.permissions)


class Keyring:
    """All keys of a server."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = [(key.secret.encode("utf-8", "surrogateescape"), key.client) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def client_ids(self) -> tuple[str, ...]:
        """The ids of all clients."""
        return tuple(dict.fromkeys(client.id for _, client in self._keys))

    def client(self, authorization: bytes) -> Client | None:
        """Whose key is in an ``Authorization`` header; ``None``: nobody's. Without keys it is anybody."""
        if not self._keys:
            return ANYBODY
        kind, _, given = authorization.partition(b" ")
        given, found = given.strip(), None
        # Every key is compared, in constant time, so that the time tells nothing.
        for secret, client in self._keys:
            if hmac.compare_digest(given, secret):
                found = client
        return found if kind.lower() == b"bearer" else None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in a file: one a line, and after it, if wanted, ``name=NAME`` and permissions; ``#`` begins a comment.

    Raises ``ConfigError`` that names the line, never the key.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the API keys in '{path}': {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the file of API keys '{path}' is not UTF-8 text") from error
    found: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, permissions = "", set()
        for word in words[1:]:
            match = _NAME.fullmatch(word)
            if word.startswith("#"):
                break
            if match is not None:
                name = match.group(1)
            elif word in PERMISSIONS:
                permissions.add(word)
            else:
                raise ConfigError(
                    f"line {number} of '{path}': after a key may come name=NAME and {', '.join(PERMISSIONS)}"
                )
        if words[0] in found:
            raise ConfigError(f"line {number} of '{path}' has a key that an earlier line has too")
        found[words[0]] = ApiKey(words[0], name, frozenset(permissions))
    if not found:
        raise ConfigError(f"there is no API key in '{path}'")
    return tuple(found.values())


def readable_by_others(path: Path) -> bool:
    """Whether other users of this machine may read ``path``."""
    return bool(path.stat().st_mode & stat.S_IROTH)
