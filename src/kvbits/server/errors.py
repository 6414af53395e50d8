"""Every failure in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, and never a traceback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from kvbits.errors import RequestError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


_LONGEST = 2000
"""Characters of a message."""


class ApiError(Exception):
    """A request that ends with an HTTP error. ``retry_after`` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        # Some quote what the client sent, which may be megabytes.
        self.message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON that the client gets, also in the middle of a stream."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside name fields as the client does: ``names`` of ours, and what they are called there."""
    try:
        yield
    except (ApiError, RequestError) as error:
        first, dot, rest = (error.param or "").partition(".")
        error.param = f"{names[first]}{dot}{rest}" if first in names else error.param
        raise


def invalid(error: ValidationError, data: Any = None) -> ApiError:
    """What a client got wrong in its JSON ``data``: the first mistake, by the path of its field there."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = _path(first["loc"], data, first["type"] == "missing")
    at = first.get("ctx", {}).get("at")
    if at is not None:
        path = ".".join([*([path] if path else []), str(at)[:200]])
    if first["type"] == "unknown":
        return ApiError(400, f"unknown field '{path}'", param=path, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"the field '{path}' is missing", param=path, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "unsupported":
        words = f"the field '{path}' is not supported" if at is not None else f"{path}: {message}"
        return ApiError(400, words, param=path, code="unsupported_parameter")
    where = f"{path}: " if path and str(at) not in message else ""
    return ApiError(400, f"{where}{message}", param=path or None, code="invalid_value")


def _path(loc: tuple[int | str, ...], data: Any, missing: bool) -> str:
    """Where in ``data`` a mistake is; the rest of ``loc`` names members of unions, which are ours."""
    found: list[str] = []
    for place, part in enumerate(loc):
        # The role that tells messages apart may also be the name of a field that somebody added.
        is_role = isinstance(data, dict) and data.get("role") == part
        try:
            inner = data[part]
        except (TypeError, LookupError):
            if not (missing and place == len(loc) - 1):
                continue
            inner = None
        if not is_role:
            found.append(str(part))
            data = inner
    return ".".join(found)
