"""``POST /v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvbits.engine.params import SamplingParams
from kvbits.server.completion_answer import CompletionAnswer, Wanted
from kvbits.server.errors import ApiError
from kvbits.server.openapi import takes
from kvbits.server.protocol.completion import CompletionRequest
from kvbits.server.protocol.limits import MAX_PROMPTS
from kvbits.server.routes.generate import Endpoint, Prompts
from kvbits.server.sampling import sampling_params
from kvbits.server.service import Service

router = APIRouter()

DEFAULT_TOKENS = 16
"""OpenAI's ``max_tokens`` for this endpoint."""


@router.post("/v1/completions", openapi_extra=takes(CompletionRequest))
async def completions(request: Request) -> Response:
    """Complete one prompt or several."""
    return await _ENDPOINT(request)


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
        preparer.loaded.sampling_defaults,
    )
    return prompts, params


def _answer(
    service: Service, request_id: str, body: CompletionRequest, prompts: Prompts, params: SamplingParams
) -> CompletionAnswer:
    wanted = Wanted(bool(body.echo), body.logprobs, body.max_tokens != 0)
    preparer = service.preparer
    head = service.head(request_id)
    return CompletionAnswer(head, prompts, params.n, wanted, preparer.token_bytes, body.include_usage, preparer.hidden)


_ENDPOINT = Endpoint(CompletionRequest, "cmpl", lambda body: len(body.prompts()), _prepare, _answer)
