"""Talking to a server from the terminal, with the standard library alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

from kvbits.errors import ConfigError


class Remote:
    """An OpenAI-compatible server at ``url`` (with or without ``/v1``)."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises ``ConfigError`` for what is no HTTP address."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"'{url}' is no address of a server; write for example http://127.0.0.1:8000")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._key = key

    def get(self, path: str) -> Any:
        """The JSON at ``path``. Raises ``ConfigError`` when the server cannot be reached or refuses."""
        return json.loads(b"".join(self._lines(path, None)))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events that answer ``body``. Raises ``ConfigError`` as :meth:`get` does."""
        for line in self._lines(path, body):
            if line.startswith(b"data: {"):
                event: dict[str, Any] = json.loads(line[6:])
                if "error" in event:
                    raise ConfigError(f"{self._url}: {event['error']['message']}")
                yield event

    def _lines(self, path: str, body: dict[str, Any] | None) -> Iterator[bytes]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            # Only HTTP: the constructor has refused every other scheme.
            with urllib.request.urlopen(urllib.request.Request(self._url + path, data, headers), timeout=600) as answer:
                yield from answer
        except urllib.error.HTTPError as error:
            raise ConfigError(f"{self._url}{path}: {_message(error)}") from None
        except (OSError, HTTPException) as error:
            raise ConfigError(f"cannot reach {self._url}: {getattr(error, 'reason', error)}") from None


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
