"""What the endpoints that generate text share: from a request's body to its answer, whole or in events."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response

from kvbits.engine.outputs import Delta
from kvbits.engine.params import SamplingParams
from kvbits.server.http import EventStream, unless_gone
from kvbits.server.keys import Client
from kvbits.server.merge import merge
from kvbits.server.protocol.chat import ChatRequest
from kvbits.server.protocol.completion import CompletionRequest
from kvbits.server.protocol.messages import MessagesRequest
from kvbits.server.protocol.responses import ResponsesRequest
from kvbits.server.service import Service, client_of, note, service_of
from kvbits.server.stream import Stream
from kvbits.server.usage import Usage

B = TypeVar("B", ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest)

Prompts = list[tuple[str, list[int]]]
"""Text (for an echo) and tokens of each prompt."""


class Answer(Protocol):
    """An answer as it grows."""

    usage: Usage

    def push(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """Take in a delta of the ``prompt``-th prompt; returns the chunks of a stream that it makes."""

    def last(self) -> list[dict[str, Any]]:
        """The chunks after all has ended."""

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""

    @property
    def finish_reasons(self) -> list[str | None]:
        """One for each choice."""


@dataclass(frozen=True)
class Endpoint(Generic[B]):
    """What an endpoint has of its own: its body, the prefix of its ids, and how a body becomes prompts and an answer.

    ``count`` says how many prompts a body holds before it is prepared; ``answer`` gets the request's id. ``named``:
    events of a stream have names.
    """

    body: type[B]
    prefix: str
    count: Callable[[B], int]
    prepare: Callable[[Service, B], tuple[Prompts, SamplingParams]]
    answer: Callable[[Service, str, B, Prompts, SamplingParams], Answer]
    named: bool = False

    async def __call__(self, request: Request) -> Response:
        """Read, check, prepare, submit; then events, or the whole answer when it is there."""
        service = service_of(request)
        request_id = f"{self.prefix}{uuid.uuid4().hex}"
        client = client_of(request)
        async with service.reading(request, self.body) as body:
            service.check_model(body.model)
            service.check_priority(body.priority, client)
            with service.room(max(body.n or 1, 1) * self.count(body), client):
                prompts, params = await service.prepare(request, lambda: self.prepare(service, body))
                streams = await _submit(service, request_id, body, prompts, params, client)
        answer = self.answer(service, request_id, body, prompts, params)

        def done() -> None:
            for stream in streams:
                stream.close()
            note(request, {"completion": request_id, "finish": answer.finish_reasons, **answer.usage.as_json()})

        if body.stream:
            return EventStream(_events(streams, answer), done, self.named)
        try:
            await unless_gone(request.receive, _collect(streams, answer))
        finally:
            done()
        return JSONResponse(answer.whole())


async def _submit(
    service: Service,
    request_id: str,
    body: ChatRequest | CompletionRequest | ResponsesRequest | MessagesRequest,
    prompts: Prompts,
    params: SamplingParams,
    client: Client,
) -> list[Stream]:
    streams: list[Stream] = []
    try:
        for number, (_, tokens) in enumerate(prompts):
            # Each prompt draws its own random numbers, also where they share a seed.
            own = params if params.seed is None or number == 0 else params.with_seed(params.seed + number)
            name = f"{request_id}-{number}"
            streams.append(await service.submit(name, tokens, own, body.priority, body.cache_salt, client))
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return streams


async def _events(streams: list[Stream], answer: Answer) -> AsyncIterator[dict[str, Any]]:
    async for number, delta in merge(streams):
        for chunk in answer.push(number, delta):
            yield chunk
    for chunk in answer.last():
        yield chunk


async def _collect(streams: list[Stream], answer: Answer) -> None:
    async for number, delta in merge(streams):
        answer.push(number, delta)
