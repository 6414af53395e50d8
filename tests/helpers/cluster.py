"""A cluster on a local Ray, and what is asked of it."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest

from kvbits.ray.messages import ReplicaStats, Route
from kvbits.ray.options import ClusterOptions, ReplicaOptions

ray = pytest.importorskip("ray")

MODEL = "tiny"


class Cluster:
    """The application on a local Ray; :meth:`deploy` starts it, or rolls it over."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def deploy(self, replica: ReplicaOptions, cluster: ClusterOptions) -> None:
        from kvbits.ray.run import start

        start(replica, cluster, "127.0.0.1", self.port)

    def handle(self) -> Any:
        from ray import serve

        return serve.get_deployment_handle("engines", "kvbits")

    def names(self) -> list[str]:
        from ray import serve

        status = serve.status().applications["kvbits"].deployments["engines"]
        found = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if "#engines#" in a["name"]]
        assert status is not None
        return sorted(name.rsplit("#", 1)[1] for name in found)

    def stats(self) -> dict[str, ReplicaStats]:
        found = [self.handle().stats.remote(Route(target=name)).result(timeout_s=20) for name in self.names()]
        return {stats.name: stats for stats in found}

    def kill(self, name: str) -> None:
        actor = ray.get_actor(f"SERVE_REPLICA::kvbits#engines#{name}", namespace="serve")
        ray.kill(actor)


def post(url: str, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60)


def essence(value: Any) -> Any:
    """An answer without what differs from one run to the next."""
    if isinstance(value, dict):
        return {k: essence(v) for k, v in value.items() if k not in ("id", "created")}
    return [essence(v) for v in value] if isinstance(value, list) else value


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [essence(json.loads(line)) for line in lines[:-1]]


def message(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def prose(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ijklmn.", k=length))


def talk(url: str, sessions: int = 6, turns: int = 4) -> tuple[int, int]:
    """Interleaved conversations over one system prompt; prompt tokens, and how many were cached."""
    system = message(prose(99, 80), "system")
    histories = [[system, message(prose(100 + s, 110))] for s in range(sessions)]
    prompt = cached = 0
    for turn in range(turns):
        for number, history in enumerate(histories):
            answer = post(url, {"model": MODEL, "messages": history, "max_tokens": 10, "temperature": 0})
            assert answer.status_code == 200, answer.text
            usage = answer.json()["usage"]
            prompt += usage["prompt_tokens"]
            cached += usage["prompt_tokens_details"]["cached_tokens"]
            content = answer.json()["choices"][0]["message"]["content"] or ""
            history += [message(content, "assistant"), message(prose(1000 * turn + number, 90))]
    return prompt, cached
