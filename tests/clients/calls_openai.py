"""The client of OpenAI: chats, streams, its helpers for schemas and tools, completions, responses."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from conftest import PLAIN
from pydantic import BaseModel

ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
HELLO: Any = [{"role": "user", "content": "Say hello."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
FLAT: Any = {"type": "function", "strict": False, **WEATHER["function"]}


class Person(BaseModel):
    name: str
    age: int
    mood: Literal["happy", "sad"]


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI, model: str) -> None:
    assert [row.id for row in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=20)
    assert answer.choices[0].message.content
    assert answer.usage is not None


def test_chat_of_parts(client: openai.OpenAI, model: str) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]}]
    assert client.chat.completions.create(model=model, messages=parts, max_tokens=5).choices


def test_chat_with_metadata_and_store(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=5, metadata={"run": "1"}, store=True, user="me"
    )
    assert answer.to_dict()["metadata"] == {"run": "1"}


def test_several_choices_with_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=HELLO, max_completion_tokens=5, n=2, logprobs=True, top_logprobs=3, seed=1
    )
    assert len(answer.choices) == 2
    assert answer.choices[0].logprobs is not None
    assert len((answer.choices[0].logprobs.content or [])[0].top_logprobs) == 3


def test_stream(client: openai.OpenAI, model: str) -> None:
    options: Any = {"include_usage": True, "include_obfuscation": True}
    chunks = list(
        client.chat.completions.create(model=model, messages=HELLO, max_tokens=10, stream=True, stream_options=options)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None


def test_stream_helper(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=HELLO, max_tokens=20) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content


def test_async(url: str, model: str) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(model=model, messages=HELLO, max_tokens=5)
            return answer.choices[0].message.content or ""

    assert asyncio.run(ask())


def test_json_object(client: openai.OpenAI, model: str) -> None:
    ask: Any = [{"role": "user", "content": "A JSON object with your name."}]
    answer = client.chat.completions.create(
        model=model, messages=ask, response_format={"type": "json_object"}, max_tokens=200, temperature=0
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_parse(client: openai.OpenAI, model: str) -> None:
    ask: Any = [{"role": "user", "content": "Ann is 30 and happy."}]
    answer = client.chat.completions.parse(model=model, messages=ask, response_format=Person, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_a_parsed_message_is_sent_back(client: openai.OpenAI, model: str) -> None:
    ask: Any = [{"role": "user", "content": "Ann is 30 and happy."}]
    first = client.chat.completions.parse(model=model, messages=ask, response_format=Person, max_tokens=200)
    again = [*ask, first.choices[0].message.to_dict(), {"role": "user", "content": "And Bob?"}]
    assert client.chat.completions.parse(model=model, messages=again, response_format=Person, max_tokens=200)


def test_parse_as_a_stream(client: openai.OpenAI, model: str) -> None:
    ask: Any = [{"role": "user", "content": "Ann is 30 and happy."}]
    with client.chat.completions.stream(model=model, messages=ask, response_format=Person, max_tokens=200) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Person)


def test_tools(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=ASK, tools=[WEATHER], temperature=0, max_tokens=100)
    (call,) = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"city": "Paris"}  # type: ignore[union-attr]
    assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_demanded_tools(client: openai.OpenAI, model: str, choice: Any) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASK, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=100
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert "city" in json.loads(call.function.arguments)  # type: ignore[union-attr]


def test_demanded_tools_as_a_stream(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=ASK, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=100
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert final.choices[0].message.tool_calls


def test_pydantic_tool(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=ASK, tools=[openai.pydantic_function_tool(GetWeather)], tool_choice="required",
        parallel_tool_calls=False, max_tokens=100,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, GetWeather)


def test_a_whole_round_of_tools(client: openai.OpenAI, model: str) -> None:
    first = client.chat.completions.create(
        model=model, messages=ASK, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=100
    ).choices[0].message  # fmt: skip
    result = {"role": "tool", "tool_call_id": (first.tool_calls or [])[0].id, "content": "22 degrees and sunny"}
    talk: Any = [*ASK, first, result]
    # So small a model calls again as long as it may.
    answer = client.chat.completions.create(model=model, messages=talk, temperature=0, max_tokens=60, extra_body=PLAIN)
    assert "22" in (answer.choices[0].message.content or "")


def test_completion(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=["def add(a, b):", "x ="], max_tokens=8, logprobs=2)
    assert len(answer.choices) == 2


def test_completion_as_a_stream(client: openai.OpenAI, model: str) -> None:
    chunks = list(client.completions.create(model=model, prompt="def add(a, b):", max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks)


def test_response(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.create(model=model, instructions="Be short.", input="Say hello.", max_output_tokens=20)
    assert answer.output_text


def test_response_as_a_stream(client: openai.OpenAI, model: str) -> None:
    with client.responses.stream(model=model, input="Say hello.", max_output_tokens=200) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"


def test_response_parsed(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.parse(
        model=model, input="Ann is 30 and happy.", text_format=Person, max_output_tokens=200
    )
    assert isinstance(answer.output_parsed, Person)


def test_response_with_a_round_of_tools(client: openai.OpenAI, model: str) -> None:
    talk: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = client.responses.create(
        model=model, input=talk, tools=[FLAT], tool_choice="required", parallel_tool_calls=False
    )
    call: Any = first.output[0]
    assert call.name == "get_weather"
    talk += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}]
    answer = client.responses.create(model=model, input=talk, temperature=0, max_output_tokens=60, extra_body=PLAIN)
    assert "22" in answer.output_text


def test_errors(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model=model, input="x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "x " * 200_000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model=model, input="x", previous_response_id="resp_1")
