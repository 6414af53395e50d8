"""Which names the server answers to.

A web page's owner can give the page's own name the address of this machine (DNS rebinding); the browser then lets the
page read what the server says, as if it were from there. Such a request is known by the name in its ``Host`` header.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Collection
from ipaddress import ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

from kvbits.server.errors import ApiError

_HOST = re.compile(r"(?:\[([0-9A-Fa-f.]*:[0-9A-Za-z:.%]*)\]|([^\s:\[\]/@]+))(?::\d*)?")
_EVERYWHERE = ("", "0.0.0.0", "::")


class Hosts:
    """ASGI middleware that answers 421 to every request for a name that is not ours.

    ``localhost`` and addresses are always fine: only a name can be given another address. ``allowed``: other names,
    ``*.name`` for all below one, ``*`` for any.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self._app = app
        self._any = "*" in allowed
        names = {name.lower().rstrip(".") for name in allowed} | {"localhost", "*.localhost"}
        self._names = frozenset(name for name in names if not name.startswith("*."))
        self._ends = tuple(name[1:] for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = None if self._any or scope["type"] != "http" else self._refusal(scope)
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        given = [value.decode("latin-1").strip() for name, value in scope["headers"] if name == b"host"]
        # A browser always says it; a balancer's probe in HTTP/1.0 may not.
        if not given and scope.get("http_version") == "1.0":
            return None
        found = _HOST.fullmatch(given[0]) if len(given) == 1 else None
        if found is None:
            return ApiError(400, "the request needs one Host header with a name or an address", code="invalid_host")
        name = (found[1] or found[2]).lower().rstrip(".")
        if name in self._names or name.endswith(self._ends) or _is_address(name):
            return None
        message = f"this server does not answer to the name '{name[:200]}'; --allowed-hosts adds names"
        return ApiError(421, message, code="unknown_host")


def names_of(host: str) -> tuple[str, ...]:
    """What a server that listens on ``host`` is called; on all addresses, the machine's own name too."""
    return (socket.gethostname(),) if host in _EVERYWHERE else (host,)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
