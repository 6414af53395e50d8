"""The server when things go wrong: bad requests, vanished clients, full queues, deadlines, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.faults import ASK, CHAT, LONG, TO, error_of
from helpers.serving import MODEL, Running, engine_of, running
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbits.models import LoadedModel

JSON = {"Content-Type": "application/json"}
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def server(byte_loaded: LoadedModel) -> Iterator[Running]:
    with running(engine_of(byte_loaded), max_body=200_000) as found:
        yield found


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"foo": 1}, "foo"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "role"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "content"),
    (CHAT, {"audio": {"voice": "x"}}, "audio"),
    (CHAT, {"moderation": {}}, "moderation"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"functions": []}, "functions"),
    (CHAT, {"temperature": "hot"}, "temperature"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"top_p": -0.1}, "top_p"),
    (CHAT, {"n": 0}, "n is 0"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"9999": 1}}, "9999"),
    (CHAT, {"logit_bias": {"5": 1000}}, "logit_bias"),
    (CHAT, {"stop": ["a"] * 17}, "at most 16"),
    (CHAT, {"stop": ["a", "b" * 257]}, "at most 256"),
    (CHAT, {"stop_token_ids": [5] * 129}, "at most 128"),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(1025)}}, "at most 1024"),
    (CHAT, {"n": 129}, "at most 128"),
    (CHAT, {"cache_salt": "s" * 257}, "at most 256"),
    (CHAT, {"stop": ""}, "stop"),
    (CHAT, {"seed": 10**30}, "seed"),
    (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "od"}}}}, "od"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "properties": {f"p{i}": {} for i in range(9000)}}}}}, "schemas"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}},
     "grammar"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
    (CHAT, {"tool_choice": "required"}, "tools"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": {"type": "function", "function": {"name": "g"}}}, "'g'"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 5000}]}, "context"),
    (TEXT, {"messages": ...}, "prompt"),
    (TEXT, {"messages": ..., "prompt": []}, "prompt"),
    (TEXT, {"messages": ..., "prompt": [[]]}, "prompt"),
    (TEXT, {"messages": ..., "prompt": ""}, "prompt"),
    (TEXT, {"messages": ..., "prompt": [999_999]}, "999999"),
    (TEXT, {"messages": ..., "prompt": [-1]}, "-1"),
    (TEXT, {"messages": ..., "prompt": ["a", 1]}, "prompt"),
    (TEXT, {"messages": ..., "prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"messages": ..., "prompt": "a", "best_of": 3}, "best_of"),
    (TEXT, {"messages": ..., "prompt": "a", "logprobs": 6}, "logprobs"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change", "named"), REFUSED, ids=lambda v: str(v)[:50] if v != CHAT else "chat")
def test_a_wrong_field_is_refused_by_its_name(server: Running, path: str, change: dict[str, Any], named: str) -> None:
    body = {key: value for key, value in {**ASK, **change}.items() if value is not ...}
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == 400, answer.text
    assert named in error_of(answer)["message"]
    server.idle()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{", b"\xff\xfe", b'"text"', b"NaN", b'{"messages": "\xc3"}', b"[" * 100_000,
        b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_what_is_no_request_is_refused(server: Running, path: str, body: bytes) -> None:
    answer = httpx.post(server.url + path, content=body, headers=JSON)
    assert answer.status_code == 400
    error_of(answer)


def test_other_failures_have_the_same_shape(server: Running) -> None:
    for answer, status in (
        (httpx.get(server.url + "/nowhere"), 404),
        (httpx.get(server.url + CHAT), 405),
        (httpx.post(server.url + CHAT, json=ASK | {"model": "other"}), 404),
        (httpx.post(server.url + CHAT, content=b" " * 200_001, headers=JSON), 413),
        (httpx.post(server.url + CHAT, content=iter([b" " * 100_000] * 3), headers=JSON), 413),
    ):
        assert answer.status_code == status
        error_of(answer)


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["user", "assistant", "tool", "system", "text", "function", "auto", "required", "json_object"]),
)  # fmt: skip
_KEYS = st.sampled_from(
    ["role", "content", "type", "text", "name", "function", "tool_calls", "tool_call_id", "arguments", "id",
     "parameters", "json_schema", "schema", "properties", "include_usage", "0", "70", "x"]
)  # fmt: skip
_ANY = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=12
)
_FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "n", "stop", "seed", "temperature", "top_p", "top_k", "min_p", "max_tokens",
     "max_completion_tokens", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "logit_bias", "tools",
     "tool_choice", "response_format", "presence_penalty", "frequency_penalty", "repetition_penalty", "user",
     "cache_salt", "priority", "best_of", "suffix", "tokens", "parallel_tool_calls", "chat_template_kwargs", "strange"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    path=st.sampled_from([CHAT, TEXT, "/tokenize", "/detokenize"]), change=st.dictionaries(_FIELDS, _ANY, max_size=3)
)
def test_no_body_breaks_the_server(server: Running, path: str, change: dict[str, Any]) -> None:
    base = {
        CHAT: ASK,
        TEXT: {"model": MODEL, "prompt": "abc", "max_tokens": 4},
        "/tokenize": {"prompt": "abc"},
        "/detokenize": {"tokens": [70]},
    }[path]
    # Left to itself, a request without a limit would fill the context.
    body = {**base, **change}
    if body.get("max_tokens") is None or body.get("max_completion_tokens"):
        body = {k: v for k, v in body.items() if k != "max_completion_tokens"}
        if path in (CHAT, TEXT):
            body["max_tokens"] = 4
    text = json.dumps(body).encode("utf-8", "surrogatepass")
    answer = httpx.post(server.url + path, content=text, headers=JSON, timeout=30)
    assert answer.status_code in (200, 400, 403, 404), answer.text
    if answer.status_code != 200:
        error_of(answer)
    server.idle()


def test_a_client_that_leaves_frees_its_pages_and_disturbs_nobody(server: Running) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        prompts = [f"prompt number {i} " * 5 for i in range(4)]
        bodies = [LONG | {"messages": [{"role": "user", "content": p}], "max_tokens": 120} for p in prompts]
        alone = [http.post(CHAT, json=body).json()["choices"][0]["message"]["content"] for body in bodies]

    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            others = [asyncio.create_task(http.post(CHAT, json=body)) for body in bodies]

            async def leave(stream: bool) -> None:
                body = LONG | {"messages": [{"role": "user", "content": "I shall leave"}], "stream": stream}
                task = asyncio.create_task(http.post(CHAT, json=body))
                await asyncio.sleep(0.1)
                assert not task.done()
                task.cancel()

            await asyncio.gather(*[leave(stream) for stream in (True, False, True, False)])
            return [(await other).json()["choices"][0]["message"]["content"] for other in others]

    before = server.engine.stats.finished.get("abort", 0)
    assert asyncio.run(together()) == alone
    server.idle()
    assert server.engine.stats.finished["abort"] == before + 4


def test_a_client_that_vanishes_while_it_sends_or_reads(server: Running) -> None:
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    body = json.dumps(LONG | {"stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\n{TO}Content-Length: {len(body)}\r\n\r\n".encode()
    for sent in (b"POST", head, head + body[:10], head + body, b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n"):
        for wait in (0.0, 0.05):
            with socket.create_connection(address) as connection:
                connection.sendall(sent)
                time.sleep(wait)
    server.idle()
    assert httpx.post(server.url + CHAT, json=ASK).status_code == 200


def test_what_is_no_request_gets_an_error_of_our_shape(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded)) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for sent, status in ((b"SSH-2.0-x\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, 431)):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(sent)
                answer = b"".join(iter(lambda link=connection: link.recv(4096), b""))
                assert answer.startswith(f"HTTP/1.1 {status} ".encode())
                assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {
                    "message", "type", "param", "code",
                }  # fmt: skip
        assert httpx.get(server.url + "/health").status_code == 200


def test_requests_in_one_packet_are_answered_in_order_and_nothing_is_written_into_an_answer(
    byte_loaded: LoadedModel,
) -> None:
    with running(engine_of(byte_loaded)) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        body = json.dumps(LONG | {"max_tokens": 50}).encode()
        long = f"POST {CHAT} HTTP/1.1\r\n{TO}Content-Length: {len(body)}\r\n\r\n".encode() + body
        short = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(long + short)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert answer.count(b"HTTP/1.1 200 OK") == 2
            assert answer.index(b"chat.completion") < answer.index(b'"version"')
        body = json.dumps(LONG | {"max_tokens": 700, "stream": True}).encode()
        stream = f"POST {CHAT} HTTP/1.1\r\n{TO}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(stream)
            answer = connection.recv(4096)
            connection.sendall(b"no request\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                answer += b"".join(iter(lambda: connection.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert answer.count(b"HTTP/1.1") == 1
            assert b"[DONE]" not in answer
        server.idle()


def test_an_answer_that_nobody_reads(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), send_timeout=0.3) as server:
        body = json.dumps({"prompt": ["x" * 900] * 60, "echo": True, "max_tokens": 0, "logprobs": 5}).encode()
        request = f"POST {TEXT} HTTP/1.1\r\n{TO}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            connection.sendall(request)
            end = time.monotonic() + 60
            while server.server.server_state.connections or not server.engine.stats.finished:
                assert time.monotonic() < end
                time.sleep(0.05)
        server.idle()


def test_an_engine_that_fails_answers_503_and_nothing_hangs(byte_loaded: LoadedModel, monkeypatch: Any) -> None:
    engine = engine_of(byte_loaded)
    with running(engine) as server:
        assert httpx.get(server.url + "/health").status_code == 200

        def broken() -> None:
            raise AssertionError("no such page")

        monkeypatch.setattr(engine, "step", broken)
        answer = httpx.post(server.url + CHAT, json=ASK, timeout=10)
        assert answer.status_code == 503
        assert "no such page" not in answer.text
        assert error_of(answer)["code"] == "engine_stopped"
        assert httpx.get(server.url + "/health").status_code == 503
        assert httpx.post(server.url + CHAT, json=ASK, timeout=10).status_code == 503


def test_a_model_that_fails_on_a_request_is_a_500_for_it_alone(byte_loaded: LoadedModel, monkeypatch: Any) -> None:
    engine = engine_of(byte_loaded)
    run = engine._runner.run

    def fragile(batch: Any) -> Any:
        if (batch.input_ids == 3 + 90).any():
            raise RuntimeError("this token breaks me")
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", fragile)
    with running(engine) as server:
        bad = httpx.post(server.url + TEXT, json={"prompt": [3 + 90] * 4, "max_tokens": 2})
        assert bad.status_code == 500
        assert error_of(bad)["code"] == "model_error"
        good = httpx.post(server.url + TEXT, json={"prompt": [70] * 4, "max_tokens": 1})
        assert good.status_code == 200
        server.idle()
