"""``POST /v1/responses``: OpenAI's newer shape of a chat. Nothing is kept: a conversation is sent whole."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvbits.engine.params import SamplingParams
from kvbits.server.errors import renamed
from kvbits.server.openapi import takes
from kvbits.server.protocol.responses import ResponsesRequest
from kvbits.server.responses import ResponsesAnswer
from kvbits.server.routes.chat import chat_choice, prepare_chat
from kvbits.server.routes.generate import Endpoint, Prompts
from kvbits.server.service import Service

router = APIRouter()

_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
"""What a field of a chat is called here."""


@router.post("/v1/responses", openapi_extra=takes(ResponsesRequest))
async def responses(request: Request) -> Response:
    """Answer a conversation."""
    return await _ENDPOINT(request)


def _prepare(service: Service, body: ResponsesRequest) -> tuple[Prompts, SamplingParams]:
    with renamed(_NAMES):
        return prepare_chat(service, body.chat)


def _answer(
    service: Service, request_id: str, body: ResponsesRequest, prompts: Prompts, params: SamplingParams
) -> ResponsesAnswer:
    choice = chat_choice(service, body.chat, params, 0)
    return ResponsesAnswer(request_id, service.model, body, choice, len(prompts[0][1]), params)


_ENDPOINT = Endpoint(ResponsesRequest, "resp_", lambda body: 1, _prepare, _answer, named=True)
