"""Two replicas on a local Ray, against one server: `make test-ray`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from helpers.cluster import MODEL, Cluster, essence, events, message, post, prose, talk
from helpers.serving import CONTEXT, byte_tokenizer, engine_of, running
from helpers.tiny import save, tiny_model

from kvbits.engine.config import EngineConfig
from kvbits.models import load_model
from kvbits.ray.messages import Route
from kvbits.ray.options import ClusterOptions, ReplicaOptions
from kvbits.server.options import ServerOptions

pytestmark = pytest.mark.ray
ray = pytest.importorskip("ray")

ENGINE = EngineConfig(kv_cache_dtype="int8", kv_cache_memory=4 << 20, max_num_batched_tokens=256)
TWO = ClusterOptions(min_replicas=2, max_replicas=2, health_period=1.0, drain_timeout=10.0, imbalance=100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    return save(tiny_model("llama", vocab_size=259, max_position_embeddings=CONTEXT), directory, byte_tokenizer)


@pytest.fixture(scope="module")
def replica(model: str) -> ReplicaOptions:
    return ReplicaOptions(model, ENGINE, ServerOptions(served_model_name=MODEL), dtype="float32", threads=1)


@pytest.fixture(scope="module")
def single(model: str) -> Iterator[str]:
    loaded = load_model(model, dtype="float32")
    with running(engine_of(loaded, max_num_batched_tokens=256)) as server:
        yield server.url


@pytest.fixture(scope="module")
def cluster(replica: ReplicaOptions) -> Iterator[Cluster]:
    from ray import serve

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Cluster(port)
    found.deploy(replica, TWO)
    yield found
    serve.shutdown()
    ray.shutdown()


def test_sessions_return_to_the_replica_that_holds_their_pages(
    cluster: Cluster, replica: ReplicaOptions, single: str
) -> None:
    prompt, alone = talk(single)
    # Prompts that are refused, longer than all conversations together: nobody holds them, so they weigh nothing.
    for seed in range(5):
        long = {"model": MODEL, "prompt": prose(500 + seed, 8000)}
        assert post(cluster.url, long, "/v1/completions").status_code == 400
    same, routed = talk(cluster.url)
    assert same == prompt
    served = [stats.pool.queries for stats in cluster.stats().values()]
    assert len(served) == 2
    print(f"prompt tokens by replica: {served}")
    assert min(served) > 0.2 * sum(served), served
    cluster.deploy(replica, replace(TWO, routing="random", fetch_pages=False))
    _, scattered = talk(cluster.url)
    page = httpx.get(cluster.url + "/metrics", timeout=60).text
    assert len(set(re.findall(r'replica="([^"]+)"', page))) == 2
    cluster.deploy(replica, TWO)
    print(
        f"cached share: single {alone / prompt:.1%}, by prefix {routed / prompt:.1%}, random {scattered / prompt:.1%}"
    )
    assert alone / prompt > 0.3
    assert routed >= 0.9 * alone
    assert scattered < routed


def test_conversations_that_begin_at_once_spread(cluster: Cluster) -> None:
    before = {name: stats.pool.queries for name, stats in cluster.stats().items()}

    async def main() -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [{"model": MODEL, "prompt": prose(600 + i, 200), "max_tokens": 4} for i in range(8)]
            answers = await asyncio.gather(*(client.post(cluster.url + "/v1/completions", json=b) for b in bodies))
            return [answer.status_code for answer in answers]

    assert asyncio.run(main()) == [200] * 8
    served = [stats.pool.queries - before[name] for name, stats in cluster.stats().items()]
    assert len(served) == 2
    assert sum(served) == 8 * 200
    assert min(served) >= 2 * 200, served


def test_the_openai_client_sees_no_difference(cluster: Cluster, single: str) -> None:
    def talk_to(url: str) -> list[Any]:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)
        ask = {"model": MODEL, "messages": [message(prose(9, 150))], "max_tokens": 20, "temperature": 0}
        whole = client.chat.completions.create(**ask)
        stream = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        chunks = [essence(chunk.model_dump()) for chunk in stream]
        pieces = [choice["delta"]["content"] or "" for chunk in chunks for choice in chunk["choices"]]
        assert "".join(pieces) == whole.choices[0].message.content
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=MODEL, prompt="x" * 5000)
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**{**ask, "model": "other"})
        return [
            essence(whole.model_dump()), chunks, refused.value.body, unknown.value.body,
            [model.id for model in client.models.list()],
        ]  # fmt: skip

    assert talk_to(cluster.url) == talk_to(single)


def test_replies_are_those_of_a_single_server(cluster: Cluster, single: str) -> None:
    chat = {"model": MODEL, "messages": [message(prose(1, 200))], "max_tokens": 12, "temperature": 0}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 3, "temperature": 1}),
        ("/v1/chat/completions", {**chat, "response_format": {"type": "json_object"}}),
        (
            "/v1/completions",
            {"model": MODEL, "prompt": ["one", "two"], "max_tokens": 5, "temperature": 0, "echo": True},
        ),
        ("/v1/completions", {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 5, "temperature": 0}),
        ("/tokenize", {"model": MODEL, "prompt": "hello"}),
        ("/v1/chat/completions", {**chat, "model": "other"}),
        ("/v1/chat/completions", {**chat, "temperature": -1}),
        ("/v1/chat/completions", {**chat, "messages": []}),
        ("/v1/completions", {"model": MODEL, "prompt": "x" * 5000}),
        ("/nowhere", {}),
    ]
    for path, body in bodies:
        ours, theirs = post(cluster.url, body, path), post(single, body, path)
        assert ours.status_code == theirs.status_code, (path, ours.text)
        assert essence(ours.json()) == essence(theirs.json()), path
        assert ours.headers["content-type"] == theirs.headers["content-type"]
    for path in ("/v1/models", "/health", "/version"):
        ours, theirs = httpx.get(cluster.url + path), httpx.get(single + path)
        assert (ours.status_code, ours.headers["content-type"]) == (200, theirs.headers["content-type"])
    kind, chats = {"Content-Type": "application/json"}, cluster.url + "/v1/chat/completions"
    for content, headers, status in (
        (b"{", kind, 400),
        (b"[" * 100_000, kind, 400),
        (b" " * (9 << 20), kind, 413),
        (b"{}", {}, 415),
        (b"{}", kind | {"Host": "evil.example"}, 421),
    ):
        refused = httpx.post(chats, content=content, headers=headers, timeout=20)
        assert refused.status_code == status
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}


def test_streams_are_those_of_a_single_server_and_come_piece_by_piece(cluster: Cluster, single: str) -> None:
    body = {
        "model": MODEL, "messages": [message(prose(2, 150))], "max_tokens": 40, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert events(post(cluster.url, body).text) == events(post(single, body).text)
    times = []
    with httpx.stream("POST", cluster.url + "/v1/chat/completions", json=body | {"max_tokens": 300}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line:
                times.append(time.monotonic())
    assert len(times) > 100
    assert times[50] < times[-1] - 0.02


def test_a_busy_holders_pages_travel_to_another_replica(cluster: Cluster, replica: ReplicaOptions) -> None:
    cluster.deploy(replica, replace(TWO, imbalance=0))
    system = message(prose(7, 500), "system")
    body = {"model": MODEL, "messages": [system, message("go")], "max_tokens": 400, "temperature": 0}

    async def main() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            url = cluster.url + "/v1/chat/completions"
            first = await client.post(url, json=body | {"max_tokens": 2})
            assert first.status_code == 200
            # Two at once: the second one finds the holder busy.
            one = asyncio.ensure_future(client.post(url, json=body))
            await asyncio.sleep(0.15)
            assert not one.done()
            return [await client.post(url, json=body), await one]

    answers = asyncio.run(main())
    assert [a.status_code for a in answers] == [200, 200]
    assert essence(answers[0].json())["choices"] == essence(answers[1].json())["choices"]
    stats = cluster.stats()
    assert sum(own.fetched_pages for own in stats.values()) >= 7, stats
    assert all(a.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 448 for a in answers)


def test_a_replica_killed_under_load_loses_only_its_requests(cluster: Cluster, replica: ReplicaOptions) -> None:
    cluster.deploy(replica, TWO)
    bodies = [
        {
            "model": MODEL, "messages": [message(prose(200 + i, 150))], "max_tokens": 600, "temperature": 0,
            "stream": i % 2 == 0,
        }
        for i in range(8)
    ]  # fmt: skip

    async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, str]:
        answer = await client.post(cluster.url + "/v1/chat/completions", json=body)
        return answer.status_code, answer.text

    async def main(victim: str | None) -> list[tuple[int, str]]:
        async with httpx.AsyncClient(timeout=120) as client:
            tasks = [asyncio.ensure_future(ask(client, body)) for body in bodies]
            if victim is not None:
                await asyncio.sleep(1.0)
                assert not all(task.done() for task in tasks)
                await asyncio.to_thread(cluster.kill, victim)
            return list(await asyncio.gather(*tasks))

    victim = cluster.names()[0]
    answers = asyncio.run(main(victim))
    lost = 0
    for body, (status, text) in zip(bodies, answers, strict=True):
        if body["stream"]:
            # The head of a stream is sent with its first token: one that was lost before is tried again.
            assert status == 200, text
            lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
            if lines[-1] != "[DONE]":
                lost += 1
                assert json.loads(lines[-1])["error"]["code"] == "replica_lost"
        else:
            assert status == 200, text
            assert json.loads(text)["choices"][0]["finish_reason"] == "length"
    print(f"{lost} of {len(bodies)} requests ended with an error event")
    assert 0 < lost <= 4
    end = time.monotonic() + 60
    while len([n for n in cluster.names() if n != victim]) < 2 or victim in cluster.names():
        assert time.monotonic() < end
        time.sleep(0.5)
    assert all(status == 200 for status, _ in asyncio.run(main(None)))
    for stats in cluster.stats().values():
        assert (stats.pool.open, stats.pool.sealed) == (0, 0)


def test_a_request_that_no_replica_survives_ends_with_one_clean_error() -> None:
    from ray.exceptions import RayActorError

    from kvbits.ray.front import RETRY_SECONDS, Front

    class Dying:
        """A deployment whose replicas die under every request."""

        def __init__(self) -> None:
            self.http = self
            self.asked = 0

        def options(self, **changes: Any) -> Dying:
            return self

        async def remote(self, route: Route, request: Any) -> AsyncIterator[list[Any]]:
            self.asked += 1
            raise RayActorError
            yield []

    front = Front.__new__(Front)
    front._handle, front._options, front._retries = Dying(), ServerOptions(served_model_name=MODEL), 2

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://front") as client:
            return await client.post("/v1/completions", json={"prompt": "x"})

    answer = asyncio.run(main())
    assert front._handle.asked == 3
    assert (answer.status_code, answer.headers["retry-after"]) == (503, str(RETRY_SECONDS))
    error = answer.json()["error"]
    assert error["code"] == "replica_lost"
    assert set(error) == {"message", "type", "param", "code"}


def test_a_client_that_goes_away_frees_its_pages(cluster: Cluster) -> None:
    body = {"model": MODEL, "messages": [message(prose(5, 150))], "max_tokens": 700, "stream": True}
    with httpx.stream("POST", cluster.url + "/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())
    end = time.monotonic() + 20
    while any(stats.pool.open or stats.pool.sealed for stats in cluster.stats().values()):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_update_rolls_over_without_a_failure(cluster: Cluster, replica: ReplicaOptions) -> None:
    before = cluster.names()
    changed = replace(replica, server=replace(replica.server, max_queue=99))
    body = {"model": MODEL, "messages": [message(prose(6, 100))], "max_tokens": 20, "temperature": 0}

    async def main() -> list[int]:
        statuses = []
        async with httpx.AsyncClient(timeout=60) as client:
            update = asyncio.ensure_future(asyncio.to_thread(cluster.deploy, changed, TWO))
            while not update.done():
                statuses.append((await client.post(cluster.url + "/v1/chat/completions", json=body)).status_code)
            await update
        return statuses

    statuses = asyncio.run(main())
    assert len(statuses) > 10
    assert set(statuses) == {200}
    end = time.monotonic() + 30
    while set(cluster.names()) & set(before):
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.parametrize(
    "targets", [{"target_requests": 1.0}, {"target_requests": 1000.0, "target_usage": 0.02}], ids=["requests", "pool"]
)
def test_load_brings_a_second_replica(cluster: Cluster, replica: ReplicaOptions, targets: dict[str, float]) -> None:
    # A number of replicas that was scaled to stays for Ray's delay of ten minutes; one that was given does not.
    cluster.deploy(replica, TWO)
    cluster.deploy(replica, replace(TWO, min_replicas=1, max_replicas=2, scale_up_delay=0.5, **targets))
    body = {"model": MODEL, "messages": [message(prose(8, 100))], "max_tokens": 600, "temperature": 0}

    async def main() -> int:
        most = 0
        async with httpx.AsyncClient(timeout=120) as client:
            url = cluster.url + "/v1/chat/completions"
            end = time.monotonic() + 90
            while most < 2 and time.monotonic() < end:
                answers = await asyncio.gather(*(client.post(url, json=body) for _ in range(6)))
                assert {a.status_code for a in answers} == {200}
                most = len(cluster.names())
        return most

    end = time.monotonic() + 60
    while len(cluster.names()) != 1:
        assert time.monotonic() < end
        time.sleep(0.2)
    assert asyncio.run(main()) == 2


def test_metrics_are_those_of_all_replicas(cluster: Cluster, replica: ReplicaOptions) -> None:
    cluster.deploy(replica, TWO)
    end = time.monotonic() + 30
    while len(cluster.names()) != 2:
        assert time.monotonic() < end
        time.sleep(0.2)
    for seed in range(4):
        body = {"model": MODEL, "prompt": prose(300 + seed, 200), "max_tokens": 3}
        assert post(cluster.url, body, "/v1/completions").status_code == 200
    page = httpx.get(cluster.url + "/metrics").text
    found = re.findall(r'^vllm:prompt_tokens_total\{model_name="tiny",replica="(\w+)"\} (\S+)$', page, re.MULTILINE)
    assert sorted(name for name, _ in found) == cluster.names()
    assert sum(float(value) for _, value in found) >= 800
    assert page.count("# TYPE vllm:prompt_tokens_total counter") == 1


def test_a_model_that_is_not_there_is_one_clear_error(
    cluster: Cluster, replica: ReplicaOptions, tmp_path: Path
) -> None:
    from kvbits.errors import ConfigError

    with pytest.raises(ConfigError, match="cannot start"):
        cluster.deploy(replace(replica, model=str(tmp_path / "nothing")), TWO)
