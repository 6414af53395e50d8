"""What a web page from elsewhere can make a browser send: other names, and bodies that are no JSON."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.serving import MODEL, Running, engine_of, running

from kvbits.errors import ConfigError
from kvbits.models import LoadedModel
from kvbits.server.hosts import names_of
from kvbits.server.options import ServerOptions

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: Any = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    TEXT: {"prompt": "hello", "max_tokens": 2},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [70]},
}
READ = ("/", "/health", "/version", "/metrics", "/v1/models", f"/v1/models/{MODEL}", "/kvbits/state", "/openapi.json")


@pytest.fixture(scope="module")
def server(byte_loaded: LoadedModel) -> Iterator[Running]:
    with running(engine_of(byte_loaded), allowed_hosts=("gpu.lan", "*.example.org")) as found:
        yield found


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return dict(error)


@pytest.mark.parametrize("path", [*READ, *BODIES, "/nowhere"])
def test_no_route_answers_to_a_name_that_is_not_ours(server: Running, path: str) -> None:
    ask: Any = {"method": "POST", "json": BODIES[path]} if path in BODIES else {"method": "GET"}
    assert httpx.request(url=server.url + path, **ask).status_code == (404 if path == "/nowhere" else 200)
    answer = httpx.request(url=server.url + path, headers={"Host": "evil.example:8000"}, **ask)
    assert answer.status_code == 421
    error = error_of(answer)
    assert error["code"] == "unknown_host"
    assert "'evil.example'" in error["message"]
    assert "--allowed-hosts" in error["message"]
    preflight = httpx.options(server.url + path, headers={"Host": "evil.example", "Origin": "http://evil.example"})
    assert preflight.status_code == 421


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LocalHost:1", 200), ("localhost.", 200), ("kvbits.localhost:8000", 200),
        ("127.0.0.1", 200), ("192.168.7.9:8000", 200), ("[::1]:8000", 200), ("[fe80::1]", 200), ("0.0.0.0", 200),
        ("gpu.lan", 200), ("GPU.lan:9", 200), ("a.b.example.org", 200), ("example.org", 421), ("badexample.org", 421),
        ("gpu.lan.evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421),
        ("evil.example", 421), ("1.2.3", 421), ("2130706433", 421), ("[gpu.lan]", 400), ("::1", 400),
        ("gpu.lan:8000:8000", 400), ("user@gpu.lan", 400), ("gpu.lan/", 400), ("localhost, gpu.lan", 400),
        ("", 400), ("\xe9.example", 421),
    ],
)  # fmt: skip
def test_names_and_addresses(server: Running, host: str, status: int) -> None:
    answer = httpx.get(server.url + "/health", headers={"Host": host.encode("latin-1")})
    assert answer.status_code == status, answer.text
    if status != 200:
        error_of(answer)


def test_a_missing_or_doubled_host(server: Running) -> None:
    def status(text: str) -> int:
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as link:
            link.sendall(f"GET /health {text}\r\n\r\n".encode())
            answer = http.client.HTTPResponse(link)
            answer.begin()
            return answer.status

    assert status("HTTP/1.0") == 200
    assert status("HTTP/1.0\r\nHost: evil.example") == 421
    assert status("HTTP/1.1") == 400
    assert status("HTTP/1.1\r\nHost: localhost\r\nHost: evil.example") == 400


def test_any_name_where_the_operator_says_so(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), allowed_hosts=("*",)) as server:
        assert httpx.get(server.url + "/health", headers={"Host": "any.example"}).status_code == 200


def test_a_key_is_asked_for_first(byte_loaded: LoadedModel) -> None:
    with running(engine_of(byte_loaded), api_keys=("k",)) as server:
        assert httpx.get(server.url + "/v1/models", headers={"Host": "evil.example"}).status_code == 401
        known = {"Host": "evil.example", "Authorization": "Bearer k"}
        assert httpx.get(server.url + "/v1/models", headers=known).status_code == 421
        assert httpx.get(server.url + "/metrics", headers={"Host": "evil.example"}).status_code == 421


@pytest.mark.parametrize("name", ["http://gpu.lan", "gpu.lan:8000", "", "a b", "gpu.lan/", "*gpu", "a.*"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts holds"):
        ServerOptions(served_model_name="x", allowed_hosts=(name,))


def test_what_a_bound_server_is_called() -> None:
    ServerOptions(served_model_name="x", allowed_hosts=(*names_of("::1"), *names_of("127.0.0.1"), "*.lan"))
    assert names_of("gpu.lan") == ("gpu.lan",)
    assert names_of("0.0.0.0") == names_of("::") == (socket.gethostname(),)


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json"}, 200),
        ({"Content-Type": "Application/JSON; charset=UTF-8"}, 200),
        ({"Content-Type": "application/vnd.api+json"}, 200),
        ({}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "text/plain; application/json"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=application/json"}, 415),
        ({"Content-Type": "application/json, text/plain"}, 415),
        ({"Content-Type": "application/jsonp"}, 415),
        ({"Content-Type": "application/json; charset=utf-16"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ({"Content-Type": "application/json", "Content-Encoding": "identity"}, 200),
    ],
)  # fmt: skip
def test_bodies_are_json_and_say_so(server: Running, path: str, headers: dict[str, str], status: int) -> None:
    """What a page may send to any server without asking first is refused, whatever is in it."""
    answer = httpx.post(server.url + path, content=json.dumps(BODIES[path]), headers=headers)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert error_of(answer)["code"] == "unsupported_media_type"
