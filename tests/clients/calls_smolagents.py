"""smolagents: its models, and both kinds of agents."""

from __future__ import annotations

from typing import Any

import pytest
from smolagents import CodeAgent, LiteLLMModel, OpenAIModel, ToolCallingAgent, tool

ASK: Any = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]


@tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: the city
    """
    return f"22 degrees in {city}"


@pytest.fixture
def chat(url: str, model: str) -> Any:
    return OpenAIModel(model, api_base=f"{url}/v1", api_key="none", temperature=0, max_tokens=300)


def test_generate(chat: Any) -> None:
    assert chat.generate(ASK).content


def test_stream(chat: Any) -> None:
    assert list(chat.generate_stream(ASK))


def test_demanded_tools(chat: Any) -> None:
    ask = [{"role": "user", "content": [{"type": "text", "text": "What is the weather in Paris?"}]}]
    assert chat.generate(ask, tools_to_call_from=[get_weather]).tool_calls


def test_litellm(url: str, model: str) -> None:
    found = LiteLLMModel(f"openai/{model}", api_base=f"{url}/v1", api_key="none", max_tokens=20)
    assert found.generate(ASK).content


@pytest.mark.parametrize("kind", [ToolCallingAgent, CodeAgent])
def test_agents(chat: Any, kind: Any) -> None:
    assert kind(tools=[get_weather], model=chat, max_steps=2, verbosity_level=0).run("What is the weather in Paris?")
