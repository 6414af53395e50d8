"""``POST /v1/chat/completions``."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvbits.engine.params import SamplingParams
from kvbits.server.chat_answer import ChatAnswer, ChatChoice
from kvbits.server.errors import ApiError
from kvbits.server.http import EventStream, unless_gone
from kvbits.server.openapi import takes
from kvbits.server.prepare import chosen_tools
from kvbits.server.protocol.chat import ChatRequest
from kvbits.server.sampling import sampling_params
from kvbits.server.service import Service, client_of, note, service_of
from kvbits.server.stream import Stream
from kvbits.server.tools import CallParser
from kvbits.server.usage import Usage

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    body = await service.read(request, ChatRequest)
    service.check_model(body.model)
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    client = client_of(request)
    service.check_priority(body.priority, client)
    with service.room(max(body.n or 1, 1), client):
        prompt, params = await service.prepare(request, lambda: _prepare(service, body))
        stream = await service.submit(request_id, prompt, params, body.priority, body.cache_salt, client)
    answer = _answer(service, request_id, body, prompt, params)

    def done() -> None:
        stream.close()
        note(request, {"completion": request_id, "finish": answer.finish_reasons, **answer.usage.as_json()})

    if body.stream:
        return EventStream(_events(stream, answer), done)
    try:
        await unless_gone(request.receive, _collect(stream, answer))
    finally:
        done()
    return JSONResponse(answer.whole())


def _prepare(service: Service, body: ChatRequest) -> tuple[list[int], SamplingParams]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs is only allowed when logprobs is true", param="top_logprobs")
    chosen_tools(body)
    offered = [] if body.tool_choice == "none" else body.tools or []
    prompt = service.preparer.chat_tokens(
        body.messages, offered, body.chat_template_kwargs or {}, body.split_special_tokens
    )
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return prompt, sampling_params(body, limit, logprobs, grammar=service.preparer.chat_grammar(body))


def _answer(
    service: Service, request_id: str, body: ChatRequest, prompt: list[int], params: SamplingParams
) -> ChatAnswer:
    calls = bool(chosen_tools(body)[0])
    several = body.parallel_tool_calls is not False
    name = service.preparer.token_bytes
    choices = [ChatChoice(i, CallParser() if calls else None, params.logprobs, name, several) for i in range(params.n)]
    return ChatAnswer(service.head(request_id), choices, Usage([len(prompt)]), body.include_usage)


async def _events(stream: Stream, answer: ChatAnswer) -> AsyncIterator[dict[str, Any]]:
    async for delta in stream:
        for chunk in answer.push(delta):
            yield chunk
    for chunk in answer.last():
        yield chunk


async def _collect(stream: Stream, answer: ChatAnswer) -> None:
    async for delta in stream:
        answer.push(delta)
