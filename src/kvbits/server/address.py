"""Whether an address can be listened on."""

from __future__ import annotations

import errno
import socket

from kvbits.errors import ConfigError

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What a machine without IPv6 says of a name that has such an address too."""


def check_address(host: str, port: int) -> None:
    """Raise ``ConfigError`` when nobody can listen there now: better before a model is loaded than after."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        missing = [_bind(family, address) for family, _, _, _, address in found]
        if all(missing):
            raise next(error for error in missing if error)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


def _bind(family: int, address: tuple[object, ...]) -> OSError | None:
    """Why the machine has no such ``address``. Raises ``OSError`` where another reason is in the way."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return error
        raise
    return None
