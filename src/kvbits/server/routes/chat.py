"""``POST /v1/chat/completions``."""

from __future__ import annotations

import sys
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvbits.engine.params import SamplingParams
from kvbits.server.chat_answer import ChatAnswer, ChatChoice
from kvbits.server.extras import Extras
from kvbits.server.grammars import chosen_tools, several_calls
from kvbits.server.messages import plain_text
from kvbits.server.openapi import takes
from kvbits.server.protocol.chat import AssistantMessage, ChatRequest
from kvbits.server.routes.generate import Endpoint, Prompts
from kvbits.server.sampling import sampling_params
from kvbits.server.service import Service

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    return await _ENDPOINT(request)


def prepare_chat(service: Service, body: ChatRequest) -> tuple[Prompts, SamplingParams]:
    """The prompt and the parameters of a chat. Raises ``RequestError``."""
    preparer = service.preparer
    tools, _ = chosen_tools(body)
    offered = [] if body.tool_choice == "none" else body.tools or []
    prompt = preparer.chat_tokens(body, offered)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(body, name)
    if limit is not None:
        service.worker.engine.limits.check_answer(len(prompt), limit, name)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    visible = preparer.template.marks if tools else ()
    params = sampling_params(
        body,
        limit,
        logprobs,
        grammar=preparer.grammars.of_chat(body),
        visible_tokens=visible,
        defaults=preparer.loaded.sampling_defaults,
    )
    return [("", prompt)], params


def chat_choice(service: Service, body: ChatRequest, params: SamplingParams, index: int) -> ChatChoice:
    """One of a chat's answers, still empty."""
    tools, forced = chosen_tools(body)
    preparer = service.preparer
    parser = preparer.call_parser([tool.function.name for tool in tools], forced) if tools else None
    top = sys.maxsize if body.logprob_token_ids else params.logprobs
    return ChatChoice(index, parser, top, preparer.token_bytes, several_calls(body), Extras.of(body))


def _answer(
    service: Service, request_id: str, body: ChatRequest, prompts: Prompts, params: SamplingParams
) -> ChatAnswer:
    echoed: dict[str, Any] = {} if body.metadata is None else {"metadata": body.metadata}
    if body.store is not None:
        # Nothing is kept, whatever was asked for.
        echoed["store"] = False
    choices = [chat_choice(service, body, params, index) for index in range(params.n)]
    before = body.messages[-1] if body.echo else None
    text = plain_text(before.content) if isinstance(before, AssistantMessage) else ""
    return ChatAnswer(service.head(request_id), choices, prompts[0][1], Extras.of(body), echoed, text)


_ENDPOINT = Endpoint(ChatRequest, "chatcmpl-", lambda body: 1, prepare_chat, _answer)
