"""What a server's options refuse, and what they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time

import httpx
import openai
import pytest
from helpers.faults import ASK, CHAT, LONG, TO, error_of
from helpers.serving import MODEL, engine_of, running

from kvbits.errors import ConfigError
from kvbits.models import LoadedModel
from kvbits.server.options import ServerOptions


def test_keys(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), api_keys=("first", "second")) as server:
        for key in (None, "wrong", "firs", "first second"):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            answer = httpx.post(server.url + CHAT, json=ASK, headers=headers)
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
        for key in ("first", "second"):
            answer = httpx.get(server.url + "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == 200
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/kvbits/state").status_code == 401
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="bad", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_origins(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), allowed_origins=("https://good.example",), api_keys=("k",)) as server:
        ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        good = httpx.options(server.url + CHAT, headers={"Origin": "https://good.example", **ask})
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        bad = httpx.options(server.url + CHAT, headers={"Origin": "https://bad.example", **ask})
        assert "access-control-allow-origin" not in bad.headers
        refused = httpx.post(server.url + CHAT, json=ASK, headers={"Origin": "https://good.example"})
        assert refused.status_code == 401


def test_a_full_queue_says_when_to_come_back(byte_loaded: LoadedModel) -> None:
    async def many(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            return await asyncio.gather(*[http.post(CHAT, json=LONG | {"max_tokens": 600}) for _ in range(12)])

    with running(engine_of(byte_loaded, max_num_seqs=2), max_queue=3) as server:
        answers = asyncio.run(many(server.url))
        codes = [answer.status_code for answer in answers]
        # The twelve come long before the first is done; five have a place.
        assert codes.count(200) == 5
        assert codes.count(429) == 7
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) > 0
                assert error_of(answer)["code"] == "queue_full"
        server.idle()
        assert httpx.post(server.url + CHAT, json=LONG | {"n": 6}).status_code == 400
        assert httpx.post(server.url + CHAT, json=ASK | {"n": 5}).status_code == 200


def test_a_deadline_ends_a_request(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), request_timeout=0.2) as server:
        answer = httpx.post(server.url + CHAT, json=LONG, timeout=30)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "deadline_exceeded"
        with openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            stream = client.chat.completions.create(
                model=MODEL, messages=LONG["messages"], stream=True, extra_body={"ignore_eos": True}
            )
            with pytest.raises(openai.APIError, match="deadline"):
                for _ in stream:
                    pass
        server.idle()


def test_a_body_that_never_ends(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), body_timeout=0.2) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address) as connection:
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\n{TO}Content-Length: 1000\r\n\r\n{{".encode())
            connection.settimeout(10)
            assert b" 408 " in connection.recv(1000)


def test_headers_that_never_end(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), header_timeout=0.3) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for sent in (b"", b"GET / HT", f"POST {CHAT} HTTP/1.1\r\n{TO}X-Slow: ".encode()):
            with socket.create_connection(address) as connection:
                connection.settimeout(10)
                connection.sendall(sent)
                # A byte now and then does not buy more time.
                end = time.monotonic() + 5
                answer = b""
                while not answer:
                    assert time.monotonic() < end
                    if sent.endswith(b": "):
                        connection.sendall(b"x")
                    connection.settimeout(0.05)
                    with contextlib.suppress(TimeoutError):
                        answer = connection.recv(1000)
                assert answer.startswith(b"HTTP/1.1 408 ")
                assert set(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == {
                    "message",
                    "type",
                    "param",
                    "code",
                }
        # An answer that takes longer than the headers may, and a second request on the same connection.
        with httpx.Client(base_url=server.url, timeout=30) as http:
            for _ in range(2):
                assert http.post(CHAT, json=LONG | {"max_tokens": 700}).elapsed.total_seconds() > 0.3


def test_shutdown_lets_running_requests_end(byte_loaded: LoadedModel) -> None:
    body = LONG | {"max_tokens": 100, "stream": True}
    with (
        running(engine_of(byte_loaded)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        http.stream("POST", CHAT, json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.service.worker.draining = True
        assert httpx.get(server.url + "/health").status_code == 503
        late = httpx.post(server.url + CHAT, json=ASK)
        assert late.status_code == 503
        assert late.headers["retry-after"]
        server.server.should_exit = True
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_options_that_cannot_work() -> None:
    for wrong in (
        {"max_queue": 0}, {"max_body": 0}, {"request_timeout": 0.0}, {"request_timeout": float("nan")},
        {"header_timeout": 0.0}, {"send_timeout": -1.0},
        {"drain_timeout": -1.0}, {"api_keys": ("",)}, {"api_keys": (" a",)}, {"served_model_name": ""},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=next(iter(wrong)).replace("api_keys", "API key")):
            ServerOptions(**{"served_model_name": "x", **wrong})
