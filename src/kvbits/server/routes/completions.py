"""``POST /v1/completions``."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from kvbits.engine.params import SamplingParams
from kvbits.server.completion_answer import CompletionAnswer, Wanted
from kvbits.server.errors import ApiError
from kvbits.server.http import EventStream, unless_gone
from kvbits.server.keys import Client
from kvbits.server.merge import merge
from kvbits.server.openapi import takes
from kvbits.server.protocol.completion import CompletionRequest
from kvbits.server.protocol.limits import MAX_PROMPTS
from kvbits.server.sampling import sampling_params
from kvbits.server.service import Service, client_of, note, service_of
from kvbits.server.stream import Stream

router = APIRouter()

DEFAULT_TOKENS = 16
"""OpenAI's ``max_tokens`` for this endpoint."""

Prompts = list[tuple[str, list[int]]]


@router.post("/v1/completions", openapi_extra=takes(CompletionRequest))
async def completions(request: Request) -> Response:
    """Complete one prompt or several."""
    service = service_of(request)
    body = await service.read(request, CompletionRequest)
    service.check_model(body.model)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    client = client_of(request)
    service.check_priority(body.priority, client)
    with service.room(max(body.n or 1, 1) * len(body.prompts()), client):
        prompts, params = await service.prepare(request, lambda: _prepare(service, body))
        streams = await _submit(service, request_id, body, prompts, params, client)
    wanted = Wanted(bool(body.echo), body.logprobs, body.max_tokens != 0)
    answer = CompletionAnswer(
        service.head(request_id),
        prompts,
        params.n,
        wanted,
        service.preparer.token_bytes,
        body.include_usage,
        service.preparer.hidden,
    )

    def done() -> None:
        for stream in streams:
            stream.close()
        note(request, {"completion": request_id, "finish": answer.finish_reasons, **answer.usage.as_json()})

    if body.stream:
        return EventStream(_events(streams, answer), done)
    try:
        await unless_gone(request.receive, _collect(streams, answer))
    finally:
        done()
    return JSONResponse(answer.whole())


def _prepare(service: Service, body: CompletionRequest) -> tuple[Prompts, SamplingParams]:
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, f"best_of is {body.best_of}; only the value of n is supported", param="best_of")
    given = body.prompts()
    if not 0 < len(given) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt holds {len(given)} prompts; 1 to {MAX_PROMPTS} are possible", param="prompt")
    preparer = service.preparer
    prompts: Prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append((prompt, preparer.encoder.prompt(prompt, body.add_special_tokens)))
        else:
            service.worker.engine.limits.check_prompt(prompt, room=1)
            prompts.append((preparer.decode(prompt) if body.echo else "", prompt))
    # The engine always samples one token; a client that wants none gets the prompt's probabilities alone.
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens or 1
    params = sampling_params(
        body,
        limit,
        body.logprobs,
        body.logprobs if body.echo else None,
        preparer.format_grammar(body.response_format),
    )
    return prompts, params


async def _submit(
    service: Service,
    request_id: str,
    body: CompletionRequest,
    prompts: Prompts,
    params: SamplingParams,
    client: Client,
) -> list[Stream]:
    streams: list[Stream] = []
    try:
        for number, (_, tokens) in enumerate(prompts):
            # Each prompt draws its own random numbers, also where they share a seed.
            own = params if params.seed is None else params.with_seed(params.seed + number)
            name = f"{request_id}-{number}"
            streams.append(await service.submit(name, tokens, own, body.priority, body.cache_salt, client))
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return streams


async def _events(streams: list[Stream], answer: CompletionAnswer) -> AsyncIterator[dict[str, Any]]:
    async for number, delta in merge(streams):
        for chunk in answer.push(number, delta):
            yield chunk
    for chunk in answer.last():
        yield chunk


async def _collect(streams: list[Stream], answer: CompletionAnswer) -> None:
    async for number, delta in merge(streams):
        answer.push(number, delta)
