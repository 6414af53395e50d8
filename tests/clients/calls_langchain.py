"""langchain-openai: chats, tools, structured output, an agent."""

from __future__ import annotations

from typing import Any

import pytest
from calls_openai import Person
from conftest import PLAIN
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"22 degrees in {city}"


@pytest.fixture
def chat(url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=200)  # type: ignore


def test_invoke(chat: ChatOpenAI) -> None:
    found = chat.invoke([SystemMessage("Be short."), HumanMessage("Say hello.")])
    assert found.content
    assert found.usage_metadata is not None


def test_stream(chat: ChatOpenAI) -> None:
    assert "".join(str(chunk.content) for chunk in chat.stream("Say hello."))


def test_batch(chat: ChatOpenAI) -> None:
    assert len(chat.batch(["Say hello.", "Say goodbye."])) == 2


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Any) -> None:
    assert isinstance(chat.with_structured_output(Person, method=method).invoke("Ann is 30 and happy."), Person)


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_demanded_tools(chat: ChatOpenAI, choice: str) -> None:
    bound = chat.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
    (call,) = bound.invoke("What is the weather in Paris?").tool_calls  # type: ignore[attr-defined]
    assert call["name"] == "get_weather"


def test_a_round_of_tools(chat: ChatOpenAI) -> None:
    talk: list[Any] = [HumanMessage("What is the weather in Paris?")]
    first = chat.bind_tools([get_weather]).invoke(talk)
    (call,) = first.tool_calls  # type: ignore[attr-defined]
    talk += [first, ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert "22" in str(chat.bind(extra_body=PLAIN).invoke(talk).content)


def test_agent(chat: ChatOpenAI) -> None:
    agent: Any = create_agent(chat, [get_weather])
    found = agent.invoke({"messages": [{"role": "user", "content": "What is the weather in Paris?"}]},
                         {"recursion_limit": 8})  # fmt: skip
    assert any(message.type == "tool" for message in found["messages"])


def test_responses(url: str, model: str) -> None:
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, use_responses_api=True)  # type: ignore
    assert chat.invoke("Say hello.", max_tokens=20).content


def test_completion(url: str, model: str) -> None:
    found = OpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_tokens=8)  # type: ignore
    assert found.invoke("def add(a, b):")
