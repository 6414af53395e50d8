"""What the front does with a request before a replica has it: whose it is and whether to read it, then how it begins.

The same checks in the same order as in a server without replicas, and nothing of it needs Ray.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope

from kvbits.ray.messages import HttpRequest
from kvbits.ray.prefix import block_hashes, prompt_text
from kvbits.server.body import SMALL, check_type
from kvbits.server.gate import Gate
from kvbits.server.hosts import Hosts
from kvbits.server.http import read
from kvbits.server.options import ServerOptions

_ID = b"x-request-id"


def guarded(app: ASGIApp, options: ServerOptions) -> ASGIApp:
    """``app`` for those who have a key and use a name of ours. Nothing of a body is read before."""
    return Gate(Hosts(app, options.allowed_hosts), options.keyring)


async def take(scope: Scope, receive: Receive, options: ServerOptions) -> tuple[HttpRequest, tuple[bytes, ...]]:
    """A whole request, and the block hashes of its prompt, if it has one.

    Raises ``ApiError`` for a body that is not said to be JSON, is too large or comes too slowly; ``Gone``.
    """
    request = Request(scope, receive)
    asks = scope["method"] == "POST"
    if asks:
        check_type(request.headers)
    body = await read(request, options.max_body, options.body_timeout)
    blocks: tuple[bytes, ...] = ()
    if asks:
        # Prompts of different keys have nothing in common, unless pages are shared.
        owner = request.state.client.id.encode() if options.apart else b""
        blocks = _blocks(body, owner) if len(body) <= SMALL else await asyncio.to_thread(_blocks, body, owner)
    return _whole(scope, body), blocks


def _blocks(body: bytes, owner: bytes) -> tuple[bytes, ...]:
    text = prompt_text(body)
    return block_hashes(text, owner) if text else ()


def _whole(scope: Scope, body: bytes) -> HttpRequest:
    headers = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
    request_id = scope.get("state", {}).get("facts", {}).get("request_id")
    if request_id is not None:
        # The replica's log knows the request by the name that the client gets.
        headers = [(name, value) for name, value in headers if name != _ID] + [(_ID, str(request_id).encode())]
    client = scope.get("client")
    return HttpRequest(
        scope["method"],
        scope["path"],
        scope["query_string"],
        tuple(headers),
        None if client is None else (client[0], client[1]),
        body,
    )
