"""``POST /v1/completions``."""

from __future__ import annotations

import sys

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvbits.engine.params import SamplingParams
from kvbits.server.completion_answer import CompletionAnswer, Wanted
from kvbits.server.errors import ApiError
from kvbits.server.extras import Extras
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
    preparer, limits = service.preparer, service.worker.engine.limits
    prompts: Prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append((prompt, preparer.prompt_tokens(prompt, body)))
        else:
            prompt = preparer.truncated(prompt, body)
            limits.check_prompt(prompt, room=1)
            prompts.append((preparer.decode(prompt) if body.echo else "", prompt))
    for _, tokens in prompts if body.max_tokens else ():
        limits.check_answer(len(tokens), body.max_tokens or 0, "max_tokens")
    # The engine always samples one token; a client that wants none gets the prompt's probabilities alone.
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens or 1
    params = sampling_params(
        body,
        limit,
        body.logprobs,
        body.logprobs if body.echo else None,
        preparer.grammars.of_format(body.response_format, body.structured_outputs),
        defaults=preparer.loaded.sampling_defaults,
    )
    return prompts, params


def _answer(
    service: Service, request_id: str, body: CompletionRequest, prompts: Prompts, params: SamplingParams
) -> CompletionAnswer:
    top = sys.maxsize if body.logprob_token_ids else body.logprobs
    wanted = Wanted(bool(body.echo), top, body.max_tokens != 0)
    preparer = service.preparer
    head = service.head(request_id)
    return CompletionAnswer(head, prompts, params.n, wanted, preparer.token_bytes, Extras.of(body), preparer.hidden)


_ENDPOINT = Endpoint(CompletionRequest, "cmpl-", lambda body: len(body.prompts()), _prepare, _answer)
