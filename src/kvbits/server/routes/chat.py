"""``POST /v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvbits.engine.params import SamplingParams
from kvbits.server.chat_answer import ChatAnswer, ChatChoice
from kvbits.server.errors import ApiError
from kvbits.server.openapi import takes
from kvbits.server.prepare import chosen_tools
from kvbits.server.protocol.chat import ChatRequest
from kvbits.server.routes.generate import Endpoint, Prompts
from kvbits.server.sampling import sampling_params
from kvbits.server.service import Service
from kvbits.server.tools import CallParser
from kvbits.server.usage import Usage

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _ENDPOINT(request)


def _prepare(service: Service, body: ChatRequest) -> tuple[Prompts, SamplingParams]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    chosen_tools(body)
    offered = [] if body.tool_choice == "none" else body.tools or []
    prompt = service.preparer.chat_tokens(
        body.messages, offered, body.chat_template_kwargs or {}, body.split_special_tokens
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    grammar = service.preparer.chat_grammar(body)
    defaults = service.preparer.loaded.sampling_defaults
    return [("", prompt)], sampling_params(body, limit, logprobs, grammar=grammar, defaults=defaults)


def _answer(
    service: Service, request_id: str, body: ChatRequest, prompts: Prompts, params: SamplingParams
) -> ChatAnswer:
    calls = bool(chosen_tools(body)[0])
    several = body.parallel_tool_calls is not False
    name = service.preparer.token_bytes
    choices = [ChatChoice(i, CallParser() if calls else None, params.logprobs, name, several) for i in range(params.n)]
    return ChatAnswer(
        service.head(request_id), choices, Usage([len(tokens) for _, tokens in prompts]), body.include_usage
    )


_ENDPOINT = Endpoint(ChatRequest, "chatcmpl", lambda body: 1, _prepare, _answer)
