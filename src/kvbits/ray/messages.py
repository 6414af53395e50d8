"""What travels between the front, the router and the replicas."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Route:
    """How a request is to be routed, and what the router found.

    ``blocks`` are the prompt's block hashes; ``target`` names the one replica that is meant. The router fills in
    ``holder``, the replica that was given the longest beginning of the prompt, and ``alive``, all there are, before the
    request is sent.
    """

    blocks: tuple[bytes, ...] = ()
    target: str | None = None
    holder: str | None = None
    alive: tuple[str, ...] = ()


@dataclass(frozen=True)
class HttpRequest:
    """A whole HTTP request: the serializable part of an ASGI scope, and the body."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes
