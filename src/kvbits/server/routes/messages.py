"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's shape of a chat."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvbits.engine.params import SamplingParams
from kvbits.server.anthropic import MessagesAnswer
from kvbits.server.errors import renamed
from kvbits.server.openapi import takes
from kvbits.server.protocol.items import chat_of
from kvbits.server.protocol.messages import CountRequest, MessagesRequest
from kvbits.server.routes.chat import chat_choice, prepare_chat
from kvbits.server.routes.generate import Endpoint, Prompts
from kvbits.server.service import Service, service_of

router = APIRouter()

_NAMES = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
"""What a field of a chat is called here."""


@router.post("/v1/messages", openapi_extra=takes(MessagesRequest))
async def messages(request: Request) -> Response:
    """Answer a conversation."""
    return await _ENDPOINT(request)


@router.post("/v1/messages/count_tokens", openapi_extra=takes(CountRequest))
async def count_tokens(request: Request) -> Response:
    """The tokens of a conversation."""
    service = service_of(request)
    async with service.reading(request, CountRequest) as body:
        service.check_model(body.model)

        def count() -> int:
            with renamed(_NAMES):
                return len(prepare_chat(service, chat_of(body.prompt_fields()))[0][0][1])

        return JSONResponse({"input_tokens": await service.prepare(request, count)})


def _prepare(service: Service, body: MessagesRequest) -> tuple[Prompts, SamplingParams]:
    with renamed(_NAMES):
        return prepare_chat(service, body.chat)


def _answer(
    service: Service, request_id: str, body: MessagesRequest, prompts: Prompts, params: SamplingParams
) -> MessagesAnswer:
    choice = chat_choice(service, body.chat, params, 0)
    return MessagesAnswer(request_id, service.model, choice, len(prompts[0][1]))


_ENDPOINT = Endpoint(MessagesRequest, "msg_", lambda body: 1, _prepare, _answer, named=True)
