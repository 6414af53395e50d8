"""From the bytes of a body to a request. What is too much is refused before it becomes objects.

The JSON parser holds Python's lock from a body's first byte to its last, and eight MiB can become 400 MiB of objects.
So its values are counted first, with the few functions on bytes that are faster than any loop.
"""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import Headers

from kvbits.server.errors import ApiError, invalid
from kvbits.server.protocol.base import Strict

M = TypeVar("M", bound=Strict)

SMALL = 1 << 15
"""Bytes up to which a body is parsed in the event loop, and its text tokenized beside large ones."""

MAX_NESTED = 1 << 16
"""Lists and objects in a body, whatever it is for."""

MAX_STRINGS = 1 << 18
"""Strings in a body, names included."""

_JSON = re.compile(r"application/(json|[\w.-]+\+json)\s*(;.*)?", re.IGNORECASE)
_CHARSET = re.compile(r";\s*charset\s*=\s*\"?([\w.:-]+)", re.IGNORECASE)


def check_type(headers: Headers) -> None:
    """Raise ``ApiError`` unless the body is said to be JSON.

    A web page may send anything else to any server without asking it first.
    """
    kind = headers.get("content-type", "")
    if not _JSON.fullmatch(kind.strip()):
        found = f"it is '{kind[:80]}'" if kind else "it is missing"
        raise ApiError(415, f"Content-Type must be application/json; {found}", code="unsupported_media_type")
    charset = _CHARSET.search(kind)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, f"the charset of JSON is utf-8, not {charset[1]}", code="unsupported_media_type")
    coding = headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise ApiError(415, f"Content-Encoding '{coding[:80]}' is not supported", code="unsupported_media_type")


def parse(body: bytes, kind: type[M], context: int) -> M:
    """The JSON of ``body`` as a ``kind``; a model of ``context`` tokens needs room for as many ids.

    Raises ``ApiError`` for the first mistake.
    """
    if len(body) > SMALL:
        count_values(body, max(kind.most_values, 2 * context))
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"Invalid JSON: {error}", code="invalid_value") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise invalid(error, data) from None


def count_values(text: bytes, most: int) -> int:
    """At least as many values as the JSON ``text`` holds, at most by two too many for each list or object.

    Raises ``ApiError`` for more than ``most``, ``MAX_NESTED`` lists and objects, or ``MAX_STRINGS``. What is no JSON is
    counted right up to its first mistake, which is as far as a parser reads it.
    """
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    # A string is cut out by two of them.
    if text.count(b'"') > 2 * MAX_STRINGS:
        raise _too_many("strings", MAX_STRINGS)
    outside = b"".join(text.split(b'"')[::2])
    nested = outside.count(b"[") + outside.count(b"{")
    if nested > MAX_NESTED:
        raise _too_many("lists and objects", MAX_NESTED)
    count = 1 + outside.count(b",") + nested
    if count > most:
        raise _too_many("values", most)
    return count


def _too_many(what: str, most: int) -> ApiError:
    message = f"the JSON holds more than {most:,} {what}; no request needs as many"
    return ApiError(400, message, code="request_too_large")
