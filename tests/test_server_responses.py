"""``/v1/responses`` by the stock client and its own types: the answers are those of a chat, in another shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from helpers.serving import CONTEXT, MODEL, Running
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from kvbits.models import LoadedModel

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ASK: dict[str, Any] = {"model": MODEL, "input": "hello there", "max_output_tokens": 20, "temperature": 0}
PARAMETERS = {
    "type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"],
    "additionalProperties": False,
}  # fmt: skip
PAINT: Any = {"type": "function", "name": "paint", "parameters": PARAMETERS, "strict": True}
FORCED: dict[str, Any] = {
    "tools": [PAINT], "tool_choice": {"type": "function", "name": "paint"}, "parallel_tool_calls": False,
    "max_output_tokens": 200,
}  # fmt: skip


def respond(server: Running, **fields: Any) -> Response:
    answer = httpx.post(server.url + "/v1/responses", json={**ASK, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    return Response.model_validate(answer.json(), strict=False)


def events(server: Running, **fields: Any) -> list[Any]:
    """All events, each under its own name and of the client's type; nothing follows the last."""
    body = {**ASK, **fields, "stream": True}
    text = httpx.post(server.url + "/v1/responses", json=body, timeout=60).text
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(EVENT.validate_python(event))
    assert [event.sequence_number for event in found] == list(range(len(found)))
    return found


def chat(client: openai.OpenAI, messages: list[Any], **fields: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, max_tokens=20, temperature=0, **fields)


def test_an_answer_is_that_of_the_chat(server: Running, client: openai.OpenAI) -> None:
    parts = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello "}, {"type": "input_text", "text": "there"}]}
    ]
    want = chat(client, [{"role": "user", "content": "hello there"}])
    for given in ("hello there", parts):
        found = respond(server, input=given)
        assert found.output_text == want.choices[0].message.content
        assert found.usage is not None
        assert (found.usage.input_tokens, found.usage.output_tokens) == (want.usage.prompt_tokens, 20)
        assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore
    told = chat(client, [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}])
    assert respond(server, instructions="be kind").output_text == told.choices[0].message.content


def test_what_came_back_can_be_sent_again(server: Running, client: openai.OpenAI) -> None:
    first = respond(server, **FORCED)
    (call,) = first.output
    assert call.type == "function_call"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "it is red"}
    talk = [{"role": "user", "content": "hello there"}, call.model_dump(), {"type": "reasoning", "summary": []}, result]
    function = {"name": call.name, "arguments": call.arguments}
    calls = [{"id": call.call_id, "type": "function", "function": function}]
    messages: list[Any] = [
        {"role": "user", "content": "hello there"}, {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": call.call_id, "content": "it is red"},
    ]  # fmt: skip
    assert respond(server, input=talk).output_text == chat(client, messages).choices[0].message.content


@pytest.mark.parametrize("fields", [{}, FORCED, {"top_logprobs": 2}], ids=["text", "call", "logprobs"])
def test_the_events_are_the_answer_in_pieces(server: Running, fields: dict[str, Any]) -> None:
    whole, found = respond(server, **fields), events(server, **fields)
    assert [event.type for event in found[:2]] == ["response.created", "response.in_progress"]
    last = found[-1]
    assert last.type == f"response.{whole.status}"
    assert last.response.usage == whole.usage
    assert len(last.response.output) == len(whole.output) == 1
    done = [event.item for event in found if event.type == "response.output_item.done"]
    assert done == last.response.output
    pieces = "".join(event.delta for event in found if event.type.endswith(".delta"))
    if fields is FORCED:
        assert json.loads(pieces)["colour"] in ("red", "green")
        assert pieces == last.response.output[0].arguments == whole.output[0].arguments  # type: ignore[union-attr]
    else:
        assert pieces == last.response.output_text == whole.output_text
    if "top_logprobs" in fields:
        heard = [entry for event in found if event.type == "response.output_text.delta" for entry in event.logprobs]
        said = whole.output[0].content[0].logprobs  # type: ignore[union-attr]
        assert [entry.token for entry in heard] == [entry.token for entry in said]  # type: ignore[union-attr]
        assert len(heard) == 20
        assert all(len(entry.top_logprobs) == 2 for entry in heard)


def test_the_clients_own_reader_of_streams_is_content(client: openai.OpenAI) -> None:
    wanted: Any = {"format": {"type": "json_schema", "name": "paint", "schema": PARAMETERS}}
    with client.responses.stream(**{**ASK, "max_output_tokens": 200}, text=wanted) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text
    assert json.loads(text)["colour"] in ("red", "green")
    with client.responses.stream(**{**ASK, **FORCED}) as stream:
        pieces = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert call.type == "function_call"
    assert pieces[-1].snapshot == call.arguments


def test_a_format_holds(server: Running) -> None:
    wanted = {"type": "json_schema", "name": "paint", "schema": PARAMETERS, "strict": True}
    for seed in range(3):
        found = respond(server, text={"format": wanted}, seed=seed, temperature=1.5, max_output_tokens=200)
        assert found.status == "completed"
        assert json.loads(found.output_text)["colour"] in ("red", "green")
    assert found.text is not None
    assert found.text.format is not None
    assert found.text.format.to_dict()["schema"] == PARAMETERS


def test_what_was_asked_for_is_told(server: Running, byte_loaded: LoadedModel) -> None:
    found = respond(server, metadata={"run": "7"}, store=True, temperature=0.5, top_p=0.7, user="u", include=[])
    told = found.to_dict()
    assert (found.metadata, told["store"], found.temperature, found.top_p) == ({"run": "7"}, False, 0.5, 0.7)
    # What was left out is what the model's configuration says, and that is what was used.
    left = httpx.post(server.url + "/v1/responses", json={"input": "x", "max_output_tokens": 1}).json()
    own = byte_loaded.sampling_defaults
    assert (left["temperature"], left["top_p"]) == (own.get("temperature", 1.0), own.get("top_p", 1.0))


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("previous_response_id", {"previous_response_id": "resp_1"}), ("conversation", {"conversation": "c"}),
    ("background", {"background": True}), ("odd", {"odd": 1}), ("input", {"input": 5}),
    ("tools.0", {"tools": [{"type": "web_search"}]}), ("text.verbosity", {"text": {"verbosity": "high"}}),
    ("input.0", {"input": [{"type": "item_reference", "id": "x"}]}),
    ("input.0.role", {"input": [{"role": "x", "content": ""}]}),
    ("input.0.content.0", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
    ("max_output_tokens", {"max_output_tokens": CONTEXT}), ("reasoning.effort", {"reasoning": {"effort": "low"}}),
    ("text.format", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "od"}}}}),
    ("temperature", {"temperature": 7000}), ("tool_choice", {"tool_choice": "required"}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_done_is_refused_by_its_name_here(server: Running, param: str, fields: dict[str, Any]) -> None:
    answer = httpx.post(server.url + "/v1/responses", json={**ASK, **fields}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
