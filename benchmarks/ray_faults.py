"""Two replicas under load: one is killed, then both are replaced by an update. What the clients see.

    python benchmarks/ray_faults.py --json out/ray_faults.json --chat questions.jsonl

Some clients ask without end, half of them with streams, by the stock OpenAI client without its own retries. For each
event: requests that were answered whole, that ended with an error of OpenAI's shape, and that failed in another way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from loads import Stored
from openai import APIError, OpenAI
from ray import serve
from report import Row
from servers import common_arguments

from kvbits.config import parse_bytes
from kvbits.engine.config import EngineConfig
from kvbits.ray.app import APPLICATION, ENGINES
from kvbits.ray.messages import Route
from kvbits.ray.options import ClusterOptions, ReplicaOptions
from kvbits.ray.run import connect, start
from kvbits.server.options import ServerOptions

WHOLE, OPENAI_ERROR, OTHER = "answered", "error of OpenAI's shape", "failed otherwise"


def names() -> tuple[str, ...]:
    """The replicas that requests are sent to now."""
    found = serve.get_deployment_handle(ENGINES, APPLICATION).names.remote(Route()).result(timeout_s=60)
    assert isinstance(found, tuple)
    return found


def ask(client: OpenAI, model: str, question: str, new_tokens: int, stream: bool) -> str:
    messages = [{"role": "user", "content": question}]
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": new_tokens, "temperature": 0}
    try:
        if stream:
            ends = [c.choices[0].finish_reason for c in client.chat.completions.create(**body, stream=True)]
            return WHOLE if ends and ends[-1] is not None else OTHER
        return WHOLE if client.chat.completions.create(**body).choices[0].finish_reason else OTHER
    except APIError as error:
        return OPENAI_ERROR if error.code == "replica_lost" else OTHER


def under_load(url: str, questions: Sequence[str], event: Callable[[], None], args: argparse.Namespace) -> Row:
    """Ask from ``args.clients`` threads, let ``event`` happen, ask on for some seconds."""
    ended, next_question = threading.Event(), itertools.cycle(questions)
    counts: Counter[str] = Counter()

    def client(number: int) -> None:
        openai = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)
        while not ended.is_set():
            counts[ask(openai, args.model, next(next_question), args.new_tokens, stream=number % 2 == 0)] += 1

    with ThreadPoolExecutor(args.clients) as pool:
        running = [pool.submit(client, number) for number in range(args.clients)]
        try:
            time.sleep(args.seconds)
            event()
            time.sleep(args.seconds)
        finally:
            ended.set()
        for one in running:
            one.result()
    return dict(counts)


def wait_for(what: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise SystemExit("the cluster did not recover")
        time.sleep(0.2)


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--chat", type=Path, required=True, help="questions with 'turns' (MT-Bench)")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--seconds", type=float, default=5.0, help="of load before and after an event")
    parser.add_argument("--kv-cache-dtype", default="int4")
    parser.add_argument("--port", type=int, default=8124)
    args = parser.parse_args()
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k != "json"})
    questions = [json.loads(line)["turns"][0] for line in args.chat.read_text("utf-8").splitlines()]
    config = EngineConfig(kv_cache_dtype=args.kv_cache_dtype, kv_cache_memory=parse_bytes(args.kv_cache_memory))
    replica = ReplicaOptions(args.model, config, ServerOptions(served_model_name=args.model), threads=args.threads)
    cluster = ClusterOptions(min_replicas=2, max_replicas=2, health_period=1.0)
    url = f"http://127.0.0.1:{args.port}"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.WARNING)
    connect(None)
    start(replica, cluster, "127.0.0.1", args.port)
    wait_for(lambda: len(names()) == 2)

    def kill() -> None:
        actor = ray.get_actor(f"SERVE_REPLICA::{APPLICATION}#{ENGINES}#{victim}", namespace="serve")
        ray.kill(actor)

    def update() -> None:
        changed = replace(replica, server=replace(replica.server, max_queue=replica.server.max_queue + 1))
        start(changed, cluster, "127.0.0.1", args.port)
        wait_for(lambda: not set(before) & set(names()))

    try:
        victim = names()[0]
        stored.add("a replica killed", under_load(url, questions, kill, args))
        wait_for(lambda: len(names()) == 2 and victim not in names())
        before = names()
        stored.add("both replaced by an update", under_load(url, questions, update, args))
    finally:
        serve.shutdown()
        ray.shutdown()
    kinds = (WHOLE, OPENAI_ERROR, OTHER)
    rows = [{"event": name, **{kind: case.get(kind, 0) for kind in kinds}} for name, case in stored.cases.items()]
    stored.finish(f"{args.clients} clients on two replicas: what they see", rows)


if __name__ == "__main__":
    main()
