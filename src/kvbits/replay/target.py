"""The server under load: its model, its context, its tokenizer where it lends it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx

from kvbits.errors import ConfigError

_PIECE = 200_000
"""Characters that are tokenized in one request, well below any server's limit of a body."""


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server at ``url`` (without ``/v1``), and what it says of itself."""

    url: str
    model: str
    context: int | None
    headers: Mapping[str, str]

    def client(self, timeout: float) -> aiohttp.ClientSession:
        """A client without limits of its own on connections; ``timeout`` of one request in seconds.

        Not httpx: reading a stream takes it several times as long, which a server on the same machine would pay for.
        """
        return aiohttp.ClientSession(
            headers=self.headers,
            timeout=aiohttp.ClientTimeout(total=timeout),
            connector=aiohttp.TCPConnector(limit=0),
            trust_env=True,
        )

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids of ``text`` by the server's own tokenizer; ``None`` where it has no ``/tokenize``.

        vLLM's fields and llama-server's are sent together, and alone to a server that refuses the other's.
        """
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=300) as http:
            tokens: list[int] = []
            for start in range(0, len(text), _PIECE):
                found = _tokenize(http, text[start : start + _PIECE])
                if found is None:
                    return None
                tokens += found
        return tokens

    def tokenize_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a chat, ready for the answer. Raises ``ConfigError`` where the server cannot tell."""
        with httpx.Client(base_url=self.url, headers=self.headers, timeout=300) as http:
            answer = http.post("/tokenize", json={"messages": messages})
        if answer.status_code != 200:
            raise ConfigError(f"{self.url}/tokenize does not take chats: {answer.status_code} {answer.text[:200]}")
        return [int(token) for token in answer.json()["tokens"]]


def find_target(url: str, model: str | None, key: str | None) -> Target:
    """Ask the server at ``url`` what it serves. Raises ``ConfigError`` when it does not answer or lacks ``model``."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"'{url}' is no address of a server; write for example http://127.0.0.1:8000")
    base = url.rstrip("/").removesuffix("/v1")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.get(base + "/v1/models", headers=headers, timeout=30)
        rows = answer.json()["data"] if answer.status_code == 200 else None
    except httpx.HTTPError as error:
        raise ConfigError(f"cannot reach {base}: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{base}/v1/models is no list of models") from error
    if not rows:
        raise ConfigError(f"{base}/v1/models: {answer.status_code} {answer.text[:200]}")
    names = [str(row["id"]) for row in rows]
    if model is not None and model not in names:
        raise ConfigError(f"{base} does not serve '{model}'; it serves {', '.join(names)}")
    row = rows[0 if model is None else names.index(model)]
    meta = row.get("meta") or {}
    context = row.get("max_model_len") or meta.get("n_ctx") or meta.get("n_ctx_train")
    return Target(base, str(row["id"]), None if context is None else int(context), headers)


def _tokenize(http: httpx.Client, text: str) -> list[int] | None:
    for body in ({"prompt": text, "add_special_tokens": False}, {"content": text, "add_special": False}):
        try:
            answer = http.post("/tokenize", json=body)
        except httpx.HTTPError:
            return None
        if answer.status_code != 200:
            continue
        tokens = answer.json().get("tokens")
        # A server that ignores a field that it does not know answers with nothing.
        if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
            return tokens
    return None
