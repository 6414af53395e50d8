"""pydantic-ai: text, tools, output types, streams."""

from __future__ import annotations

from typing import Any

import pytest
from calls_openai import Person
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

SHORT = ModelSettings(max_tokens=200, temperature=0)


@pytest.fixture
def chat(url: str, model: str) -> Any:
    return OpenAIChatModel(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))


def test_text(chat: Any) -> None:
    assert Agent(chat, model_settings=SHORT).run_sync("Say hello.").output


def test_history(chat: Any) -> None:
    agent = Agent(chat, instructions="Be short.", model_settings=SHORT)
    first = agent.run_sync("Say hello.")
    assert agent.run_sync("Again.", message_history=first.all_messages()).output


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput, PromptedOutput])
def test_output_types(chat: Any, kind: Any) -> None:
    agent: Any = Agent(chat, output_type=kind(Person), model_settings=SHORT, retries=3)
    assert isinstance(agent.run_sync("Ann is 30 and happy.").output, Person)


def test_tools(chat: Any) -> None:
    agent, asked = Agent(chat, model_settings=SHORT), []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "22 degrees"

    assert agent.run_sync("What is the weather in Paris?").output
    assert asked


def test_stream(chat: Any) -> None:
    found = Agent(chat, model_settings=SHORT).run_stream_sync("Say hello.")
    assert list(found.stream_text(delta=True))


def test_responses(url: str, model: str) -> None:
    found = OpenAIResponsesModel(model, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    assert Agent(found, model_settings=SHORT).run_sync("Say hello.").output
