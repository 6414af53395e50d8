"""``/v1/messages`` by a schema of Anthropic's API written down here: the answers are those of a chat, in its shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import pytest
from helpers.serving import CONTEXT, MODEL, Running

PATH, COUNT, CHAT = "/v1/messages", "/v1/messages/count_tokens", "/v1/chat/completions"
USER = {"role": "user", "content": "hello there"}
ASK: dict[str, Any] = {"model": MODEL, "messages": [USER], "max_tokens": 20, "temperature": 0}
COLOURS = {
    "type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"],
    "additionalProperties": False,
}  # fmt: skip
PAINT = {"name": "paint", "description": "Paints", "input_schema": COLOURS}
FORCED: dict[str, Any] = {"tools": [PAINT], "tool_choice": {"type": "tool", "name": "paint"}, "max_tokens": 200}


def exact(**properties: Any) -> dict[str, Any]:
    """An object of just these; a text is the one value that there may be."""
    shown = {name: {"const": value} if isinstance(value, str) else value for name, value in properties.items()}
    return {"type": "object", "properties": shown, "required": list(shown), "additionalProperties": False}


TEXT: Any = {"type": "string"}
COUNTED: Any = {"type": "integer", "minimum": 0}
USAGE = exact(
    input_tokens=COUNTED, output_tokens=COUNTED, cache_read_input_tokens=COUNTED, cache_creation_input_tokens=COUNTED
)
WORDS, CALL = exact(type="text", text=TEXT), exact(type="tool_use", id=TEXT, name=TEXT, input={"type": "object"})
ENDED = {
    "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", None]},
    "stop_sequence": {"type": ["string", "null"]},
}
MESSAGE = exact(
    id={"type": "string", "pattern": "^msg_"}, type="message", role="assistant", model=MODEL, **ENDED, usage=USAGE,
    content={"type": "array", "items": {"oneOf": [WORDS, CALL]}},
)  # fmt: skip
EVENTS = {
    "message_start": exact(type="message_start", message=MESSAGE),
    "content_block_start": exact(type="content_block_start", index=COUNTED, content_block={"oneOf": [WORDS, CALL]}),
    "content_block_delta": exact(
        type="content_block_delta",
        index=COUNTED,
        delta={"oneOf": [exact(type="text_delta", text=TEXT), exact(type="input_json_delta", partial_json=TEXT)]},
    ),
    "content_block_stop": exact(type="content_block_stop", index=COUNTED),
    "message_delta": exact(type="message_delta", delta=exact(**ENDED), usage=USAGE),
    "message_stop": exact(type="message_stop"),
}


def post(server: Running, path: str, body: dict[str, Any], **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json={**body, **fields}, timeout=60)


def ask(server: Running, **fields: Any) -> dict[str, Any]:
    answer = post(server, PATH, ASK, **fields)
    assert answer.status_code == 200, answer.text
    jsonschema.validate(answer.json(), MESSAGE)
    return dict(answer.json())


def chat(server: Running, messages: list[Any], **fields: Any) -> dict[str, Any]:
    return dict(post(server, CHAT, ASK, messages=messages, **fields).json())


def text_of(answer: dict[str, Any]) -> str:
    return "".join(block["text"] for block in answer["content"] if block["type"] == "text")


def streamed(server: Running, **fields: Any) -> tuple[dict[str, Any], list[str]]:
    """The message that the events make, block by block, and the names of the events."""
    message: dict[str, Any] = {}
    names, writing = [], ""
    for block in post(server, PATH, ASK, **fields, stream=True).text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        jsonschema.validate(event, EVENTS[event["type"]])
        names.append(event["type"])
        match event["type"]:
            case "message_start":
                message = event["message"]
                assert message["content"] == []
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                writing = ""
            case "content_block_delta":
                assert event["index"] == len(message["content"]) - 1
                writing += event["delta"].get("text", event["delta"].get("partial_json"))
            case "content_block_stop":
                last = message["content"][event["index"]]
                last |= {"text": writing} if last["type"] == "text" else {"input": json.loads(writing)}
            case "message_delta":
                message |= {**event["delta"], "usage": event["usage"]}
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert names.count("content_block_start") == names.count("content_block_stop") == len(message["content"])
    return message, names


def test_an_answer_is_that_of_the_chat(server: Running) -> None:
    parts = [{"type": "text", "text": "hello there", "cache_control": {"type": "ephemeral"}}]
    want = chat(server, [USER])
    for content in ("hello there", parts):
        found = ask(server, messages=[{"role": "user", "content": content}])
        assert text_of(found) == want["choices"][0]["message"]["content"]
        assert (found["stop_reason"], found["stop_sequence"]) == ("max_tokens", None)
        usage = found["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == want["usage"]["prompt_tokens"]
        assert usage["output_tokens"] == 20
    told = chat(server, [{"role": "system", "content": "be kind"}, USER])["choices"][0]["message"]["content"]
    for system in ("be kind", [{"type": "text", "text": "be kind"}]):
        assert text_of(ask(server, system=system)) == told


def test_a_forced_call_and_its_result(server: Running) -> None:
    first = ask(server, **FORCED)
    (call,) = first["content"]
    assert (call["type"], call["name"], first["stop_reason"]) == ("tool_use", "paint", "tool_use")
    jsonschema.validate(call["input"], COLOURS)
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "it is red"}]}
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    talk = [USER, {"role": "assistant", "content": [thought, call]},
            {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]}]  # fmt: skip
    function = {"name": "paint", "arguments": json.dumps(call["input"])}
    calls = [{"id": call["id"], "type": "function", "function": function}]
    messages = [
        USER, {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": call["id"], "content": "it is red"}, {"role": "user", "content": "and now?"},
    ]  # fmt: skip
    assert text_of(ask(server, messages=talk)) == chat(server, messages)["choices"][0]["message"]["content"]


def test_choices_of_tools(server: Running) -> None:
    once = {"type": "any", "disable_parallel_tool_use": True}
    assert [block["name"] for block in ask(server, **{**FORCED, "tool_choice": once})["content"]] == ["paint"]
    plain = ask(server, **{**FORCED, "tool_choice": {"type": "none"}, "max_tokens": 20})
    assert text_of(plain) == text_of(ask(server))


@pytest.mark.parametrize("fields", [{}, FORCED], ids=["text", "call"])
def test_the_events_make_the_answer(server: Running, fields: dict[str, Any]) -> None:
    whole = ask(server, **fields)
    message, names = streamed(server, **fields)
    assert names.count("content_block_delta") >= (1 if fields else 2)
    for found in (whole, message):
        found["usage"] = sum(found["usage"].values())
        for name in ("id", *(["content"] if fields else [])):
            found[name] = len(found[name]) if name == "id" else [{**block, "id": ""} for block in found[name]]
    assert message == whole


def test_an_answer_by_a_schema(server: Running) -> None:
    config = {"format": {"type": "json_schema", "schema": {"enum": ["ab"]}}}
    assert json.loads(text_of(ask(server, output_config=config))) == "ab"
    message, _ = streamed(server, output_config=config)
    assert json.loads(text_of(message)) == "ab"


def test_a_stop_sequence_is_named(server: Running) -> None:
    whole = text_of(ask(server))
    stop = next(c for c in whole[3:] if c.isascii() and c.isprintable() and c != " ")
    found, (message, _) = ask(server, stop_sequences=["zzz", stop]), streamed(server, stop_sequences=["zzz", stop])
    for answer in (found, message):
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
        assert text_of(answer) == whole[: whole.index(stop)]


def test_tokens_are_counted_as_the_prompt_has_them(server: Running) -> None:
    for fields in ({}, {"system": "be kind"}, {"tools": [PAINT]}):
        body = {name: value for name, value in ASK.items() if name in ("model", "messages")}
        counted = post(server, COUNT, body, **fields).json()
        usage = ask(server, **fields)["usage"]
        assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("max_tokens", {"max_tokens": None}), ("max_tokens", {"max_tokens": CONTEXT}), ("messages", {"messages": []}),
    ("thinking", {"thinking": {"type": "enabled", "budget_tokens": 5}}), ("odd", {"odd": 1}),
    ("messages.0.role", {"messages": [{"role": "tool", "content": "x"}]}),
    ("messages.0.content.0", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
    ("tools.0", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ("tools.0.name", {"tools": [{"name": "no name", "input_schema": {}}]}),
    ("metadata.odd", {"metadata": {"odd": "x"}}), ("stop_sequences", {"stop_sequences": ["x" * 300]}),
    ("temperature", {"temperature": -1}), ("output_config.effort", {"output_config": {"effort": "low"}}),
    ("output_config.format", {"output_config": {"format": {"type": "json_schema", "schema": {"type": "od"}}}}),
    ("output_config.format.type", {"output_config": {"format": {"type": "text"}}}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_done_is_refused_by_its_name_here(server: Running, param: str, fields: dict[str, Any]) -> None:
    answer = post(server, PATH, ASK, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
