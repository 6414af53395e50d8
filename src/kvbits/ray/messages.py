"""What travels between the front, the router and the replicas."""

from __future__ import annotations

from dataclasses import dataclass

from kvbits.pages import PoolStats


@dataclass
class Route:
    """How a request is to be routed, and what the router found.

    ``blocks`` are the prompt's block hashes; ``target`` names the one replica that is meant. The router fills in
    ``holder``, the replica that was given the longest beginning of the prompt, and ``alive``, all there are, before the
    request is sent. Router and front share this object: the front says in ``taken`` whether the replica took the
    prompt or refused it, so that the router does not remember what nobody holds.
    """

    blocks: tuple[bytes, ...] = ()
    target: str | None = None
    holder: str | None = None
    alive: tuple[str, ...] = ()
    taken: bool | None = None


@dataclass(frozen=True)
class HttpRequest:
    """A whole HTTP request: the serializable part of an ASGI scope, and the body."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes


@dataclass(frozen=True)
class ReplicaStats:
    """A replica's name, its pool, and the pages that it took from others: how many, in how many bytes and seconds."""

    name: str
    pool: PoolStats
    fetched_pages: int
    fetched_bytes: int
    fetch_seconds: float
