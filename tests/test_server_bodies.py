"""Bodies that are large, wrong, or both: parsing them costs little, whatever they hold."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.large import JUST, LARGE, large_body
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kvbits.errors import RequestError
from kvbits.server.body import MAX_NESTED, count_values, parse
from kvbits.server.errors import ApiError
from kvbits.server.messages import MAX_ARGUMENTS, plain_messages
from kvbits.server.protocol.base import Strict
from kvbits.server.protocol.chat import ChatRequest
from kvbits.server.protocol.completion import CompletionRequest, DetokenizeRequest, TokenizeRequest
from kvbits.server.protocol.messages import CountRequest, MessagesRequest
from kvbits.server.protocol.responses import ResponsesRequest

KINDS: tuple[type[Strict], ...] = (
    ChatRequest, CompletionRequest, ResponsesRequest, MessagesRequest, CountRequest, TokenizeRequest, DetokenizeRequest,
)  # fmt: skip
MANY = 20_000
NAMES = {str(i): "x" for i in range(MANY)}
WRONG: dict[str, Any] = {
    "numbers, then a string": [0] * MANY + ["x"], "strings, then a number": ["x"] * MANY + [0],
    "strings": ["x"] * MANY, "floats": [0.5] * MANY, "nulls": [None] * MANY, "lists": [[]] * MANY,
    "objects": [{}] * MANY, "unknown objects": [{"a": 0}] * MANY, "an object": NAMES, "objects of many": [NAMES] * 3,
    "lists of many": [[0] * MANY, ["x"] * MANY], "numbers by name": dict.fromkeys(NAMES, 0) | {"x": "y"},
    "messages without text": [{"role": "user", "content": [0] * 50}] * 400, "no roles": [{"content": "x"}] * MANY,
    "wrong parts": [{"role": "user", "content": [{"type": "text"}] * MANY}],
    "unknown parts": [{"role": "user", "content": [{"type": "text", "text": "x", **NAMES}]}],
    "answers": [{"role": "assistant", "content": [{"type": "refusal"}] * MANY, "tool_calls": [{}] * MANY}],
    "tools": [{"type": "function", "function": {**NAMES}}] * 10, "a choice": {"type": "function", "function": NAMES},
    "a format": {"type": "json_schema", "json_schema": {"name": "x", **NAMES}}, "odd text": "x" * MANY,
}  # fmt: skip


def errors_of(kind: type[Strict], data: Any) -> int:
    try:
        kind.model_validate(data)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("kind", KINDS)
def test_of_many_mistakes_only_the_first_is_made_an_error(kind: type[Strict]) -> None:
    """Every field of every request; a field may be one of several things, each of which says what is wrong."""
    for field in kind.model_fields:
        for name, value in WRONG.items():
            assert errors_of(kind, {field: value}) <= 8, f"{field}: {name}"
    assert errors_of(kind, NAMES) == 1


def test_the_first_mistake_is_named() -> None:
    def refused(data: Any, kind: type[Strict] = ChatRequest) -> ApiError:
        with pytest.raises(ApiError) as caught:
            parse(json.dumps(data).encode(), kind, 1024)
        assert caught.value.status == 400
        return caught.value

    good = {"role": "user", "content": "x"}
    assert refused({"messages": [good] * 30 + [{"role": "user"}] * 500}).param == "messages.30.content"
    assert refused({"messages": [good], "b": 1, "a": 2}).param == "b"
    tool = {"type": "function", "function": {"name": "f", "odd": 1}}
    assert refused({"messages": [good], "tools": [tool]}).message == "unknown field 'tools.0.function.odd'"
    assert "'7'" in refused({"messages": [good], "logit_bias": {"5": 1, "6": -1.5, "7": "1"}}).message
    assert refused({"tokens": [0] * 4000 + ["x"]}, DetokenizeRequest).param == "tokens.4000"
    assert refused({"prompt": ["x"] * 300}, CompletionRequest).message.endswith("300 prompts; 1 to 256 are possible")
    # What a client sent is not sent back by the megabyte.
    assert len(refused({"messages": [{"role": "x" * 1_000_000}]}).message) < 3000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [400, 4000, 4300])
def test_integers_of_many_digits_are_refused_in_few_words(kind: type[Strict], size: int) -> None:
    """No float holds them, and Python writes none of more than 4,300 digits."""
    number = "9" * size
    chat = '"messages":[{"role":"user","content":"x"}]'
    needed = {ChatRequest: chat, CompletionRequest: '"prompt":"x"', DetokenizeRequest: '"tokens":[]',
              ResponsesRequest: '"input":"x"', CountRequest: chat,
              MessagesRequest: f'{chat},"max_tokens":1'}.get(kind, '"model":"x"')  # fmt: skip
    parse(f"{{{needed}}}".encode(), kind, 1024)
    # What a template gets may be anything.
    for field in kind.model_fields.keys() - {"chat_template_kwargs"}:
        for value in (number, f"-{number}", f"[{number}]", f'{{"5":{number}}}'):
            with pytest.raises(ApiError) as caught:
                parse(f'{{{needed},"{field}":{value}}}'.encode(), kind, 1024)
            assert caught.value.status == 400
            assert len(caught.value.message) < 400


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\[{,}]:\n\u00e9', max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text('a"\\[,', max_size=4), inner, max_size=5),
    max_leaves=40,
)  # fmt: skip


def counted(value: Any) -> tuple[int, int]:
    """All values in ``value``, itself included, and the lists and objects among them."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None:
        return 1, 0
    below = [counted(part) for part in parts]
    return 1 + sum(count for count, _ in below), 1 + sum(nested for _, nested in below)


@settings(deadline=None)
@given(value=VALUES, ascii_only=st.booleans(), spread=st.sampled_from([None, 1]))
def test_values_are_counted_without_parsing(value: Any, ascii_only: bool, spread: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=spread).encode()
    values, nested = counted(value)
    assert values <= count_values(text, sys.maxsize) <= values + nested


@pytest.fixture
def peak() -> Iterator[Callable[[], float]]:
    """MiB of Python's memory at most since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LARGE)
def test_eight_mebibytes_of_anything_stay_few_objects(kind: type[Strict], name: str, peak: Callable[[], float]) -> None:
    body = large_body(name)
    with pytest.raises(ApiError) as caught:
        parse(body, kind, 1024)
    assert caught.value.status == 400
    assert len(caught.value.message) < 3000
    assert peak() < 80, "MiB, eight of them the body; each list or object takes 56 bytes at least"


@pytest.mark.parametrize("name", JUST)
def test_what_is_just_not_too_much_stays_few_objects_too(name: str, peak: Callable[[], float]) -> None:
    for kind in KINDS:
        with pytest.raises(ApiError):
            parse(JUST[name], kind, 1024)
    assert peak() < 150


def test_a_prompt_of_ids_that_no_context_holds_is_refused_before_it_is_parsed() -> None:
    body = b'{"prompt":[' + b"12345," * 1_000_000 + b"1]}"
    with pytest.raises(ApiError, match="more than 524,288 values"):
        parse(body, CompletionRequest, 8192)
    # Unless the model's context may hold it.
    assert len(parse(body, CompletionRequest, 1_000_001).prompt) == 1_000_001
    with pytest.raises(ApiError, match=f"more than {MAX_NESTED:,} lists and objects"):
        parse(b'{"prompt":[' + b"[]," * MAX_NESTED + b"[]]}", CompletionRequest, 1_000_001)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("[" * 60_000, "recursion limit"),
        ("[" * 900 + "]" * 900, "recursion limit"),
        ("1" * 5000, "out of range"),
        ('{"a": NaN}', "not JSON"),
        ("[" + "0," * MAX_ARGUMENTS + "0]", "more than 131,072 values"),
        ("[" + "[]," * MAX_ARGUMENTS + "0]", "more than 65,536 lists"),
    ],
)
def test_arguments_of_calls_are_json_in_json(arguments: str, words: str) -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": arguments}}
    chat = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    messages = parse(json.dumps(chat).encode(), ChatRequest, 1024).messages
    with pytest.raises((RequestError, ApiError), match=words):
        plain_messages(messages)


def test_many_calls_share_one_bound() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": json.dumps([0] * 30_000)}}
    chat = {"messages": [{"role": "assistant", "tool_calls": [call] * 6}]}
    messages = parse(json.dumps(chat).encode(), ChatRequest, 1024).messages
    with pytest.raises(ApiError, match="values"):
        plain_messages(messages)
    assert len(plain_messages(messages[:0])) == 0
