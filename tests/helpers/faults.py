"""Requests that a server's tests send by hand, and the shape of its errors."""

from __future__ import annotations

from typing import Any

import httpx

from helpers.serving import MODEL

TO = "Host: localhost\r\nContent-Type: application/json\r\n"


CHAT = "/v1/chat/completions"


ASK: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


LONG: Any = ASK | {"max_tokens": 900, "ignore_eos": True, "temperature": 0}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error of ``answer``, which must have OpenAI's shape."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in answer.text
    found: dict[str, Any] = body["error"]
    return found
