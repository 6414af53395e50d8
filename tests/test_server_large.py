"""What one client sends costs the others nothing: bodies up to the limit, and a vocabulary as real models have."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
from helpers.hostile import CHAT, TEXT
from helpers.large import JUST, LARGE, SIZE, large_body
from helpers.process import SMALL, serving, wait_idle
from helpers.serving import MODEL, byte_model, engine_of, running
from helpers.tiny import save, tiny_model
from helpers.vocabulary import SIZE as VOCAB
from helpers.vocabulary import large_tokenizer
from pydantic import StrictInt, TypeAdapter, ValidationError

from kvbits.engine.limits import RequestLimits
from kvbits.server.prepare import Preparer

CONTEXT = 2048
JSON = {"Content-Type": "application/json"}
PATHS = (CHAT, TEXT, "/tokenize", "/detokenize")


@dataclass
class Watch:
    """Seconds that ``/health`` took, and what the process grew to, in bytes."""

    seconds: list[float] = field(default_factory=list)
    memory: int = 0


@contextmanager
def watched(url: str, pid: int) -> Iterator[Watch]:
    watch, done, process = Watch(), threading.Event(), psutil.Process(pid)

    def look() -> None:
        with httpx.Client(base_url=url, timeout=300) as http:
            while not done.is_set():
                begin = time.monotonic()
                assert http.get("/health").status_code == 200
                watch.seconds.append(time.monotonic() - begin)
                watch.memory = max(watch.memory, process.memory_info().rss)
                done.wait(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield watch
    finally:
        done.set()
        thread.join(300)
    assert not thread.is_alive()


def blocked_seconds(mistakes: int) -> float:
    """What it takes this machine at this moment to make an error of each of so many mistakes."""
    begin, few = time.monotonic(), 20_000
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(list[StrictInt]).validate_python(["x"] * few)
    assert len(caught.value.errors()) == few
    return (time.monotonic() - begin) * mistakes / few


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    model = tiny_model("llama", vocab_size=VOCAB, max_position_embeddings=CONTEXT)
    directory = save(model, tmp_path_factory.mktemp("model"), large_tokenizer)
    with serving(directory, *SMALL, "--served-model-name", MODEL, "--allowed-hosts", "gpu.lan") as found:
        yield found


def error_of(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 5000
    return str(error["message"])


def test_bodies_up_to_the_limit_hurt_nobody(server: tuple[Any, str]) -> None:
    process, url = server
    attacks = [(PATHS[i % 4], large_body(name)) for i, name in enumerate(LARGE)]
    attacks += [(path, body) for body in JUST.values() for path in PATHS]

    def attack(path: str, body: bytes) -> str:
        return error_of(httpx.post(url + path, content=body, headers=JSON, timeout=300))

    httpx.post(url + TEXT, json={"prompt": "hello", "max_tokens": 1}, timeout=60).raise_for_status()
    before = psutil.Process(process.pid).memory_info().rss
    with watched(url, process.pid) as watch, ThreadPoolExecutor(4) as pool:
        messages = list(pool.map(attack, *zip(*attacks, strict=True)))
    assert all(messages)
    # One list of wrong numbers took as long as this where each became an error.
    blocked = blocked_seconds(SIZE // 2)
    worst, typical = max(watch.seconds), sorted(watch.seconds)[len(watch.seconds) // 2]
    print(f"/health: {typical * 1e3:.0f} ms, at most {worst * 1e3:.0f}; blocked {blocked:.1f} s; "
          f"{(watch.memory - before) / 2**20:,.0f} MiB more")  # fmt: skip
    assert worst < blocked / 8
    assert typical < blocked / 80
    assert watch.memory - before < 700 << 20
    wait_idle(url)


def test_right_prompts_that_are_too_long_are_refused_for_their_length(server: tuple[Any, str]) -> None:
    process, url = server
    text = "the cat and 17 dogs " * (SIZE // 20 - 10)
    ids = "[" + "4711," * 500_000 + "4711]"
    before = psutil.Process(process.pid).memory_info().rss
    with watched(url, process.pid) as watch:
        for path, body, words in (
            (TEXT, f'{{"prompt":"{text}"}}', "at least"),
            (TEXT, f'{{"prompt":["x","{text}"]}}', "at least"),
            (CHAT, f'{{"messages":[{{"role":"user","content":"{text}"}}]}}', "at least"),
            (TEXT, f'{{"prompt":{ids}}}', "500001 tokens"),
            (TEXT, f'{{"prompt":[[5],{ids}]}}', "500001 tokens"),
            (TEXT, f'{{"prompt":[{"4711," * 1_600_000}4711]}}', "more than 524,288 values"),
        ):
            message = error_of(httpx.post(url + path, content=body.encode(), headers=JSON, timeout=300))
            assert words in message
            assert "values" in words or f"maximum context length is {CONTEXT}" in message
    assert watch.memory - before < 500 << 20
    assert max(watch.seconds) < blocked_seconds(SIZE // 2) / 8


def test_names_from_the_command_line(server: tuple[Any, str]) -> None:
    for host, status in (("gpu.lan", 200), ("localhost", 200), ("127.0.0.1", 200), ("evil.example", 421)):
        assert httpx.get(server[1] + "/health", headers={"Host": host}).status_code == status


def test_long_texts_are_tokenized_and_written_all_the_same(server: tuple[Any, str]) -> None:
    _, url = server
    text = "the cat and 17 dogs \u00e9 " * 10_000
    found = httpx.post(url + "/tokenize", json={"prompt": text, "return_token_strs": True}, timeout=300).json()
    assert found["tokens"] == large_tokenizer()(text)["input_ids"]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), CONTEXT)
    assert len(found["token_strs"]) == found["count"]
    assert found["token_strs"][:5000] == httpx.post(
        url + "/tokenize", json={"prompt": text[:40_000], "return_token_strs": True}, timeout=300
    ).json()["token_strs"][:5000]  # fmt: skip
    back = httpx.post(url + "/detokenize", json={"tokens": found["tokens"]}, timeout=300).json()
    assert back == {"prompt": text}
    assert httpx.post(url + "/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_small_requests_do_not_wait_behind_large_ones() -> None:
    """Every thread for large requests is held, and many more wait."""
    loaded, held = byte_model(), threading.Event()
    preparer = Preparer(loaded, RequestLimits(vocab=259, context=1024, pool=1024, memory=1))

    async def small() -> list[int]:
        waiting = [asyncio.ensure_future(preparer.run(held.wait, large=True)) for _ in range(20)]
        try:
            return await asyncio.wait_for(preparer.run(lambda: preparer.encoder.prompt("ab", True), large=False), 60)
        finally:
            held.set()
            await asyncio.gather(*waiting)

    assert asyncio.run(small()) == loaded.tokenizer("ab")["input_ids"]
    preparer.close()


def test_a_small_request_is_answered_while_a_large_one_is_prepared() -> None:
    loaded, held, entered = byte_model(), threading.Event(), threading.Event()
    with running(engine_of(loaded)) as server:
        # What /tokenize counts may be longer than the context.
        ids = server.service.preparer.bounded.ids

        def slow(text: str, special: bool) -> list[int]:
            if len(text) > 1000:
                entered.set()
                held.wait(120)
            return ids(text, special)

        server.service.preparer.bounded.ids = slow  # type: ignore[method-assign]
        large = {"prompt": "x" * 100_000}
        with ThreadPoolExecutor(12) as pool:
            waiting = [pool.submit(httpx.post, server.url + "/tokenize", json=large, timeout=120) for _ in range(12)]
            try:
                assert entered.wait(60)
                small = httpx.post(server.url + TEXT, json={"prompt": "hello", "max_tokens": 1}, timeout=60)
                assert small.status_code == 200
                assert not any(each.done() for each in waiting)
            finally:
                held.set()
            assert [each.result().json()["count"] for each in waiting] == [100_000] * 12
