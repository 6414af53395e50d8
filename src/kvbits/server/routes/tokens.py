"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvbits.server.errors import ApiError
from kvbits.server.openapi import takes
from kvbits.server.protocol.completion import DetokenizeRequest, TokenizeRequest
from kvbits.server.service import Service, service_of

router = APIRouter()


@router.post("/tokenize", openapi_extra=takes(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Token ids of a prompt or a chat."""
    service = service_of(request)
    body = await service.read(request, TokenizeRequest)
    service.check_model(body.model)
    tokens = await service.preparer.run(lambda: _tokens(service, body))
    found: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": service.worker.engine.max_model_len,
        "tokens": tokens,
    }
    if body.return_token_strs:
        found["token_strs"] = [service.preparer.token_bytes(t).decode("utf-8", "replace") for t in tokens]
    return JSONResponse(found)


@router.post("/detokenize", openapi_extra=takes(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service = service_of(request)
    body = await service.read(request, DetokenizeRequest)
    service.check_model(body.model)
    if body.tokens:
        vocab = service.worker.engine.limits.vocab
        outside = [token for token in body.tokens if not 0 <= token < vocab]
        if outside:
            raise ApiError(400, f"tokens holds {outside[0]}; the vocabulary is 0 to {vocab - 1}", param="tokens")
    text = await service.preparer.run(lambda: service.preparer.decode(body.tokens))
    return JSONResponse({"prompt": text})


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    if body.prompt is not None:
        return service.preparer.text_tokens(body.prompt, body.add_special_tokens)
    if not body.messages:
        raise ApiError(400, "messages is empty", param="messages")
    generation, split = body.add_generation_prompt, body.split_special_tokens
    return service.preparer.tokenize_chat(body.messages, body.tools or [], generation, split)
