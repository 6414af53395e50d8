"""The client of Anthropic, by ``/v1/messages``."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from conftest import PLAIN

ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def test_message(client: anthropic.Anthropic, model: str) -> None:
    part: Any = {"type": "text", "text": "Say hello.", "cache_control": {"type": "ephemeral"}}
    found = client.messages.create(
        model=model, max_tokens=20, system="Be short.", messages=[{"role": "user", "content": [part]}]
    )
    assert found.content[0].type == "text"
    assert found.stop_reason in ("end_turn", "max_tokens")


def test_stream(client: anthropic.Anthropic, model: str) -> None:
    with client.messages.stream(model=model, max_tokens=20, messages=ASK) as stream:
        assert "".join(stream.text_stream)
        assert stream.get_final_message().usage.output_tokens


def test_a_round_of_tools(client: anthropic.Anthropic, model: str) -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    first = client.messages.create(model=model, max_tokens=100, messages=ASK, tools=[WEATHER], tool_choice=choice)
    assert first.stop_reason == "tool_use"
    call: Any = first.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "22 degrees"}
    talk: Any = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    found: Any = client.messages.create(
        model=model, max_tokens=60, messages=talk, extra_body={"temperature": 0, **PLAIN}
    )
    assert "22" in found.content[0].text


def test_stop_sequences(client: anthropic.Anthropic, model: str) -> None:
    ask: Any = [{"role": "user", "content": "Count: 1, 2, 3, 4, 5, 6"}]
    found = client.messages.create(
        model=model, max_tokens=60, messages=ask, stop_sequences=["4"], extra_body={"temperature": 0, **PLAIN}
    )
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "4")


def test_count(client: anthropic.Anthropic, model: str) -> None:
    assert client.messages.count_tokens(model=model, messages=ASK).input_tokens > 5
