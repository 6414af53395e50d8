"""Malformed and hostile requests: nothing hangs, breaks, leaks pages, changes another answer, or shows a traceback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from helpers.hostile import CHAT, CONTINUE, Tally, judge, storm
from helpers.large import SIZE
from helpers.serving import CONTEXT, MODEL, Running, engine_of, running
from helpers.tiny import save, tiny_model
from helpers.vocabulary import SIZE as VOCAB
from helpers.vocabulary import large_tokenizer
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.generation import GenerationMode

from kvbits.models import load_model

# Here, not in the test: Python 3.11's compiler fails when other threads, here the server's, compile too.
load_all_checks()

MAX_BODY = SIZE
WITNESS: Any = {
    "model": MODEL, "messages": [{"role": "user", "content": "what did you see? " * 8}], "max_tokens": 60,
    "temperature": 0, "ignore_eos": True,
}  # fmt: skip
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/tokenize", "/detokenize", "/v1/models", "/v1/models/{name}",
)  # fmt: skip
ALLOWED = {200, 400, 403, 404, 405, 408, 413, 415, 429, 503}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    # Packed layers, so that an answer depends on nothing beside it; float32 where this processor has none.
    model = tiny_model("llama", vocab_size=VOCAB, max_position_embeddings=CONTEXT)
    directory = save(model, tmp_path_factory.mktemp("model"), large_tokenizer)
    loaded = load_model(directory, dtype="bfloat16")
    exact = loaded.depends_on_rows() is None
    if not exact:
        loaded = load_model(directory, dtype="float32")
    # Requests without a limit of their own end by the deadline, and slow clients soon.
    limits = {"request_timeout": 5.0, "body_timeout": 3.0, "header_timeout": 3.0, "send_timeout": 3.0}
    with running(engine_of(loaded, batch_invariant=exact), max_body=MAX_BODY, **limits) as found:
        yield found


@contextmanager
def undisturbed(server: Running) -> Iterator[None]:
    """An honest client asks all the while and must get the answer from before each time. No page is left after it."""

    def ask() -> Any:
        for _ in range(200):
            answer = httpx.post(server.url + CHAT, json=WITNESS, timeout=60)
            # A crowd may fill the queue, and the deadline holds for everybody.
            if answer.status_code not in (429, 503):
                return answer.json()["choices"][0]["message"]["content"]
        raise AssertionError(answer.text)

    before, done, answers = ask(), threading.Event(), [None]

    def keep_asking() -> None:
        while not done.is_set():
            answers.append(ask())

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(120)
    assert not thread.is_alive()
    assert set(answers[1:]) == {before}
    server.idle(60)


def check(tally: Tally, count: int) -> None:
    assert not tally.faults, tally.faults[:5]
    assert sum(tally.seen.values()) == count
    kinds = {name.partition(":")[0] for name in tally.seen}
    assert len(kinds) == 16, kinds


def test_hostile_clients(server: Running) -> None:
    with undisturbed(server):
        tally = storm(server.url, 160, MAX_BODY, seed=1)
    check(tally, 160)


def test_the_description_holds(server: Running) -> None:
    against_the_description(server, 4)


@pytest.mark.soak
def test_many_hostile_clients(server: Running, request: pytest.FixtureRequest) -> None:
    count = request.config.getoption("--hostile-requests")
    described = max(1, count // (10 * 2 * len(PATHS)))
    with undisturbed(server):
        against_the_description(server, described)
    rest = max(300, count - 2 * len(PATHS) * described)
    with undisturbed(server):
        tally = storm(server.url, rest, MAX_BODY, seed=2)
    for name, number in sorted(tally.seen.items()):
        print(f"{number:6,} {name}")
    check(tally, rest)


def against_the_description(server: Running, examples: int) -> None:
    """Requests made from our own OpenAPI description, right ones and wrong ones, ``examples`` of each for each path."""
    described = schemathesis.openapi.from_url(server.url + "/openapi.json")
    session = requests.Session()
    operations = [found.ok() for found in described.get_all_operations()]
    chosen = [operation for operation in operations if operation.path in PATHS]
    assert {operation.path for operation in chosen} == set(PATHS)
    checks = schemathesis.checks.CHECKS.get_by_names(["response_schema_conformance", "content_type_conformance"])
    for operation in chosen:
        # Nothing, or any name at all, cannot be asked for wrongly.
        modes = tuple(GenerationMode)[: 1 if operation.method.upper() == "GET" else 2]
        for mode in modes:

            @settings(
                max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                answer = case.call(base_url=server.url, session=session, timeout=60)
                assert answer.status_code in ALLOWED, answer.text
                assert b"Traceback" not in answer.content
                case.validate_response(answer, checks=checks)

            ask()
    server.idle(60)


def test_the_judge_knows_a_bad_answer() -> None:
    head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n\r\n"
    good = b'{"error": {"message": "m", "type": "t", "param": null, "code": null}}'
    assert judge(head % 400 + good) == 400
    assert judge(b"") == judge(CONTINUE) == 0
    for bad in (head % 500 + good, head % 400 + b'{"detail": 1}', head % 400 + b"Traceback (most", b"SSH-2.0",
                b"HTTP/1.1 400 X\r\nSet-Cookie: b\r\n\r\n"):  # fmt: skip
        assert isinstance(judge(bad), str)
