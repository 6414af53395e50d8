"""openai-agents, by chats and by responses."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from calls_openai import Person

set_tracing_disabled(True)
SHORT = ModelSettings(max_tokens=200, temperature=0)


@pytest.fixture(params=[OpenAIChatCompletionsModel, OpenAIResponsesModel], ids=["chats", "responses"])
def chat(request: pytest.FixtureRequest, url: str, model: str) -> Any:
    return request.param(model=model, openai_client=openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none"))


def run(agent: Any, text: str) -> Any:
    return asyncio.run(Runner.run(agent, text, max_turns=5)).final_output


def test_text(chat: Any) -> None:
    assert run(Agent("a", instructions="Be short.", model=chat, model_settings=SHORT), "Say hello.")


def test_output_type(chat: Any) -> None:
    agent = Agent("a", model=chat, model_settings=SHORT, output_type=Person)
    assert isinstance(run(agent, "Ann is 30 and happy."), Person)


def test_tools(chat: Any) -> None:
    asked = []

    @function_tool
    def get_weather(city: str) -> str:
        """The weather of a city."""
        asked.append(city)
        return "22 degrees"

    settings = ModelSettings(max_tokens=200, temperature=0, tool_choice="required", parallel_tool_calls=False)
    assert run(Agent("a", model=chat, model_settings=settings, tools=[get_weather]), "What is the weather in Paris?")
    assert asked


def test_stream(chat: Any) -> None:
    async def stream() -> list[Any]:
        found = Runner.run_streamed(Agent("a", model=chat, model_settings=SHORT), "Say hello.")
        return [event async for event in found.stream_events()]

    assert asyncio.run(stream())
