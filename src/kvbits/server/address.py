"""The address that a server listens on, taken before the model is loaded."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from kvbits.errors import ConfigError

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What a machine without IPv6 says of a name that has such an address too."""


def take_address(host: str, port: int) -> list[socket.socket]:
    """Sockets that are bound to every address of ``host`` and do not listen yet: until then clients are refused.

    Raises ``ConfigError`` with the reason when nobody can listen there now.
    """
    taken: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        missing: list[OSError] = []
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                taken.append(_bind(family, address))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing.append(error)
        if not taken:
            raise missing[0]
    except OSError as error:
        release(taken)
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return taken


def release(sockets: Sequence[socket.socket]) -> None:
    """Give addresses back."""
    for taken in sockets:
        taken.close()


def _bind(family: int, address: tuple[object, ...]) -> socket.socket:
    """Alone where that is possible: Linux lets two sockets that both allow reuse have one address until one listens.

    What an earlier server's connections leave behind for a minute can only be shared.
    """
    try:
        return _bound(family, address, reuse=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return _bound(family, address, reuse=True)


def _bound(family: int, address: tuple[object, ...], reuse: bool) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


def listen(sockets: Sequence[socket.socket], host: str, port: int) -> None:
    """Let clients connect; a server that follows may have the address at once.

    Raises ``ConfigError`` when somebody else listens there by now.
    """
    try:
        for taken in sockets:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.listen(2048)
    except OSError as error:
        release(sockets)
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
