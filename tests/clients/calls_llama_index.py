"""llama-index: chats, completions, structured prediction, tools."""

from __future__ import annotations

from typing import Any

import pytest
from calls_openai import Person
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"22 degrees in {city}"


@pytest.fixture
def chat(url: str, model: str) -> Any:
    return OpenAILike(
        model=model, api_base=f"{url}/v1", api_key="none", is_chat_model=True, is_function_calling_model=True,
        max_tokens=200, temperature=0, context_window=8192,
    )  # fmt: skip


def test_chat(chat: Any) -> None:
    assert chat.chat([ChatMessage(role="system", content="Be short."), ChatMessage(content="Say hello.")]).message


def test_stream(chat: Any) -> None:
    assert list(chat.stream_chat([ChatMessage(content="Say hello.")]))[-1].message.content


def test_complete(url: str, model: str) -> None:
    found = OpenAILike(model=model, api_base=f"{url}/v1", api_key="none", is_chat_model=False, max_tokens=8)
    assert found.complete("def add(a, b):").text


def test_structured_prediction(chat: Any) -> None:
    assert isinstance(chat.structured_predict(Person, PromptTemplate("Ann is 30 and happy.")), Person)


@pytest.mark.parametrize("required", [True, False])
def test_tools(chat: Any, required: bool) -> None:
    tool = FunctionTool.from_defaults(get_weather)
    found = chat.chat_with_tools([tool], user_msg="What is the weather in Paris?", tool_required=required)
    assert chat.get_tool_calls_from_response(found)[0].tool_name == "get_weather"
