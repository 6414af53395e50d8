"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvbits.server.errors import ApiError
from kvbits.server.openapi import takes
from kvbits.server.protocol.completion import DetokenizeRequest, TokenizeRequest
from kvbits.server.service import Service, service_of

router = APIRouter()

_PIECE = 10_000
"""Values that are written as JSON at once."""


@router.post("/tokenize", openapi_extra=takes(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or a chat."""
    service = service_of(request)
    async with service.reading(request, TokenizeRequest) as body:
        service.check_model(body.model)
        return Response(await service.prepare(request, lambda: _answer(service, body)), media_type="application/json")


@router.post("/detokenize", openapi_extra=takes(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service = service_of(request)
    async with service.reading(request, DetokenizeRequest) as body:
        service.check_model(body.model)
        return JSONResponse({"prompt": await service.prepare(request, lambda: _text(service, body.tokens))})


def _text(service: Service, tokens: list[int]) -> str:
    vocab = service.worker.engine.limits.vocab
    outside = next((token for token in tokens if not 0 <= token < vocab), None)
    if outside is not None:
        raise ApiError(400, f"tokens holds {outside}; the vocabulary is 0 to {vocab - 1}", param="tokens")
    return service.preparer.decode(tokens)


def _answer(service: Service, body: TokenizeRequest) -> bytes:
    """The answer as JSON, made piece by piece: in one go it would hold Python's lock for as long as it takes."""
    tokens = _tokens(service, body)
    head = {"count": len(tokens), "max_model_len": service.worker.engine.max_model_len}
    parts = [json.dumps(head)[:-1], ', "tokens": [', *_pieces(tokens), "]"]
    if body.return_token_strs:
        name = service.preparer.token_bytes
        parts += [', "token_strs": [', *_pieces([name(token).decode("utf-8", "replace") for token in tokens]), "]"]
    else:
        # vLLM's clients look for it.
        parts.append(', "token_strs": null')
    return "".join([*parts, "}"]).encode()


def _pieces(values: Sequence[int | str]) -> Iterator[str]:
    for start in range(0, len(values), _PIECE):
        yield ("," if start else "") + json.dumps(values[start : start + _PIECE], separators=(",", ":"))[1:-1]


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.prompt is not None:
        return service.preparer.tokenize_text(body.prompt, body.add_special_tokens)
    if not body.messages:
        raise ApiError(400, "messages is empty", param="messages")
    return service.preparer.tokenize_chat(body)
