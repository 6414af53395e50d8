"""What happens to every request: an id, the key, a line in the log."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvbits.server.errors import ApiError
from kvbits.server.http import Gone
from kvbits.server.keys import ANYBODY, Client, Keyring

log = logging.getLogger("kvbits.access")

_PROTECTED = ("/v1", "/tokenize", "/detokenize", "/kvbits/")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """ASGI middleware. ``X-Request-Id`` is taken from the client where it is harmless, and sent back."""

    def __init__(self, app: ASGIApp, keys: Keyring) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, object] = {"request_id": request_id}
        scope.setdefault("state", {})["facts"] = facts
        status = 0
        begin = time.monotonic()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            client = self._client(scope, headers)
            if client is not None:
                scope["state"]["client"] = client
                if client.name:
                    facts["key"] = client.name
                await self._app(scope, receive, answer)
            else:
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await error.response()(scope, receive, answer)
        except Gone:
            status = status or 499
        finally:
            facts |= {"method": scope["method"], "path": scope["path"], "status": status}
            facts["seconds"] = round(time.monotonic() - begin, 4)
            client = scope.get("client")
            log.info("request", extra={"facts": {**facts, "client": client[0] if client else None}})

    def _client(self, scope: Scope, headers: Headers) -> Client | None:
        """Who asks; ``None``: somebody who must not."""
        open_to_all = scope["path"] == "/v1/health" or not scope["path"].startswith(_PROTECTED)
        if scope["method"] == "OPTIONS" or open_to_all:
            return ANYBODY
        given = headers.get("authorization")
        if given is None and "x-api-key" in headers:
            # How Anthropic's clients send it.
            given = f"Bearer {headers['x-api-key']}"
        return self._keys.client((given or "").encode("latin-1"))
