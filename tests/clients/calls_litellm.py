"""LiteLLM, by both of its providers for such a server."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest
from calls_openai import ASK, HELLO, WEATHER, Person
from conftest import PLAIN

litellm.drop_params = False
litellm.suppress_debug_info = True


@pytest.fixture(params=["openai", "hosted_vllm"])
def ask(request: pytest.FixtureRequest, url: str, model: str) -> dict[str, Any]:
    return {"model": f"{request.param}/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 100}


def test_chat(ask: Any) -> None:
    assert litellm.completion(messages=HELLO, **ask).choices[0].message.content


def test_stream(ask: Any) -> None:
    chunks = litellm.completion(messages=HELLO, stream=True, stream_options={"include_usage": True}, **ask)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_demanded_tools_and_their_result(ask: Any) -> None:
    found = litellm.completion(messages=ASK, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **ask)
    message = found.choices[0].message
    (call,) = message.tool_calls
    assert "city" in json.loads(call.function.arguments)
    # The message as LiteLLM keeps it, with fields of its own.
    talk = [*ASK, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "22 degrees"}]
    assert "22" in litellm.completion(messages=talk, temperature=0, extra_body=PLAIN, **ask).choices[0].message.content


def test_schema(ask: Any) -> None:
    talk = [{"role": "user", "content": "Ann is 30 and happy."}]
    found = litellm.completion(messages=talk, response_format=Person, **ask)
    Person.model_validate_json(found.choices[0].message.content)


def test_what_is_too_long_is_known_as_such(ask: Any) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "x " * 200_000}], num_retries=0, **ask)


def test_cache_control_in_messages(ask: Any) -> None:
    part = {"type": "text", "text": "Say hello.", "cache_control": {"type": "ephemeral"}}
    assert litellm.completion(messages=[{"role": "user", "content": [part]}], **ask).choices[0].message.content
