"""The bodies in the OpenAPI description: routes read them themselves, so FastAPI does not know them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from kvbits.server.protocol.chat import ChatRequest
from kvbits.server.protocol.completion import CompletionRequest, DetokenizeRequest, TokenizeRequest
from kvbits.server.protocol.messages import CountRequest, MessagesRequest
from kvbits.server.protocol.responses import ResponsesRequest

_BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountRequest, TokenizeRequest,
    DetokenizeRequest,
)  # fmt: skip
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """What a route that reads a ``model`` adds to its description."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    error = {
        "description": "Error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "responses": {"default": error},
    }


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description of ``app``."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
        )
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(bodies["$defs"], Error=_ERROR)
        app.openapi_schema = found
    return app.openapi_schema
