"""``kvbits serve`` as a process: what it says when it starts, and how it ends."""

from __future__ import annotations

import io
import json
import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers.process import SMALL, command, free_port, saved_byte_model, serving
from helpers.serving import byte_model, engine_of, running

from kvbits.cli.main import run
from kvbits.errors import ConfigError
from kvbits.server.address import listen, release, take_address

LONG = {"prompt": "abc", "max_tokens": 1000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """Undo what a server that starts in this process does to the loggers."""
    loggers = [logging.getLogger(name) for name in ("kvbits", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_it_says_what_it_serves_and_drains_on_sigterm(model: str) -> None:
    with serving(model, *SMALL, "--served-model-name", "small") as (process, url):
        lines: list[str] = []
        body = LONG | {"model": "small", "max_tokens": 400}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            lines = [line for line in events if line]
        assert lines[-1] == "data: [DONE]"
        assert process.wait(30) == 0
        said = process.said().splitlines()
    logged = [json.loads(line) for line in said]  # from the first line on
    (start,) = [line["message"] for line in logged if line["message"].startswith("kvbits serves")]
    for part in ("small", "int4", "bits per element", "4 MiB", "1,024 tokens"):
        assert part in start
    (done,) = [line for line in logged if line.get("path") == "/v1/completions"]
    assert done["status"] == 200
    assert done["finish"] == ["length"]
    assert done["completion_tokens"] == 400
    assert done["request_id"]
    assert not any("exception" in line for line in logged)


def test_what_does_not_end_in_time_is_ended(model: str) -> None:
    with serving(model, *SMALL, "--drain-timeout", "0.1", "--max-num-seqs", "8") as (process, url):
        last: list[str] = []

        def read(i: int) -> None:
            body = LONG | {"n": 8, "seed": i}
            with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
                last.append([line for line in answer.iter_lines() if line][-1])

        threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        for thread in threads:
            thread.join(10)
        assert len(last) == 3
        assert all("shutting down" in line for line in last), last


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--log-level", "loud"), "loud"),
        (("--max-queue", "0"), "max_queue"),
        (("--api-key", ""), "API key"),
        (("--max-body", "big"), "big"),
        (("--request-timeout", "-1"), "request_timeout"),
        (("--port", "0"), "port"),
        (("--kv-cache-dtype", "int9"), "int9"),
    ],
)
def test_a_mistake_is_one_line(
    model: str, options: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run(["serve", model, *options])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("kvbits: error: ")
    assert named in said


def test_a_port_that_is_taken(model: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(command(model, port, *SMALL), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    # Before the model was loaded, which may take minutes.
    assert done.stderr.strip() == f"kvbits: error: cannot listen on 127.0.0.1:{port}: Address already in use"


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid", "2001:db8::1"])
def test_an_address_that_is_not_ours(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:8000: [A-Z-]"):
        take_address(host, 8000)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_an_address_that_is_free(host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    held = take_address(host, port)
    try:
        with pytest.raises(ConfigError, match="Address already in use"):
            take_address(host, port)
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", port))
    finally:
        release(held)
    release(take_address(host, port))


def test_an_address_whose_last_server_has_just_ended() -> None:
    """Connections that a server closes linger for a minute; another one takes their address all the same."""
    port = free_port()
    for _ in range(2):
        held = take_address("127.0.0.1", port)
        listen(held, "127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port)) as client:
            served, _ = held[0].accept()
            served.close()
            assert client.recv(1) == b""
        release(held)


def test_health_says_503_while_requests_end(model: str) -> None:
    with serving(model, *SMALL) as (process, url), httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            events = answer.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            end = time.monotonic() + 20
            while (health := httpx.get(url + "/health", timeout=20)).status_code == 200:
                assert time.monotonic() < end
            assert (health.status_code, health.json()["error"]["code"]) == (503, "shutting_down")
            assert httpx.get(url + "/kvbits/state", timeout=20).json()["draining"] is True
            refused = httpx.post(url + "/v1/completions", json=LONG, timeout=20)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert [line for line in events if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0


def test_the_page_is_installed() -> None:
    import kvbits.server

    assert (Path(kvbits.server.__file__).parent / "page.html").stat().st_size > 1000


def test_chat_and_top_against_a_server(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with running(engine_of(byte_model()), api_keys=("k",)) as server:
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n\n"))
        with pytest.raises(SystemExit) as end:
            run(["chat", "--url", server.url + "/v1", "--api-key", "k", "--max-tokens", "5", "--temperature", "0"])
        assert end.value.code == 0
        shown = capsys.readouterr()
        assert shown.err.count("tokens/s") == 2
        assert "MiB" in shown.err
        ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}
        answer = httpx.post(server.url + "/v1/chat/completions", json=ask, headers={"Authorization": "Bearer k"})
        assert shown.out.startswith(answer.json()["choices"][0]["message"]["content"])
        with pytest.raises(SystemExit) as end:
            run(["top", server.url, "--api-key", "k", "--once"])
        assert end.value.code == 0
        assert "bits per element" in capsys.readouterr().out
        for wrong, named in ((["top", server.url], "API key"), (["top", "nowhere"], "nowhere"), (["chat"], "MODEL")):
            with pytest.raises(SystemExit) as end:
                run(wrong)
            assert end.value.code == 2
            assert named in capsys.readouterr().err


def test_chat_with_a_model_in_this_process(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello " * 30 + "\nagain\n"))
    options = ["--max-tokens", "5", "--kv-cache-dtype", "int8", *SMALL[:-2]]
    with pytest.raises(SystemExit) as end:
        run(["chat", model, *options])
    assert end.value.code == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    assert len(notes) == 2
    assert "; 0 of " in notes[0]
    assert "; 192 of " in notes[1], "the second turn begins with the first, of which whole pages are cached"
