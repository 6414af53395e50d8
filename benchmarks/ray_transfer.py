"""A prompt that one replica has computed, asked of another one: computed again, or its pages taken from the first.

    python benchmarks/ray_transfer.py --json out/ray_transfer.json --text book.txt --tokens 512 2048

Two replicas on a local Ray. For each length the text is new to both; replica A computes it, then B is asked for it with
A named as its holder, so that the pages come through Ray's object store. The time is to B's first token.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from pathlib import Path
from typing import Any

import ray
from loads import Stored
from ray import serve
from report import Row
from servers import common_arguments
from tqdm import tqdm

from kvbits.config import parse_bytes
from kvbits.engine.config import EngineConfig
from kvbits.ray.app import APPLICATION, ENGINES
from kvbits.ray.messages import HttpRequest, ReplicaStats, Route
from kvbits.ray.options import ClusterOptions, ReplicaOptions
from kvbits.ray.run import connect, start
from kvbits.server.options import ServerOptions

PAGE = 64


class Pair:
    """Two replicas, each of which can be asked alone."""

    def __init__(self) -> None:
        self._handle = serve.get_deployment_handle(ENGINES, APPLICATION)
        end = time.monotonic() + 120
        while len(names := self._handle.names.remote(Route()).result(timeout_s=60)) < 2:
            if time.monotonic() > end:
                raise SystemExit("the second replica did not start")
            time.sleep(0.5)
        self.first, self.second = names

    def ask(
        self, name: str, path: str, body: dict[str, Any], holder: str | None = None
    ) -> tuple[dict[str, Any], float]:
        """An answer of that replica, and its seconds."""
        route = Route(target=name, holder=holder, alive=(self.first, self.second))
        headers = ((b"content-type", b"application/json"),)
        request = HttpRequest("POST", path, b"", headers, None, json.dumps(body).encode())
        began = time.perf_counter()
        messages = [m for batch in self._handle.options(stream=True).http.remote(route, request) for m in batch]
        seconds = time.perf_counter() - began
        answer = json.loads(b"".join(m.get("body", b"") for m in messages[1:]))
        if messages[0]["status"] != 200:
            raise SystemExit(f"the replica answered {answer}")
        return answer, seconds

    def stats(self, name: str) -> ReplicaStats:
        found = self._handle.stats.remote(Route(target=name)).result(timeout_s=60)
        assert isinstance(found, ReplicaStats)
        return found


def measure(pair: Pair, model: str, tokens: list[int]) -> Row:
    """One prompt of ``tokens``: computed by the first replica, then asked of the second one."""
    body = {"model": model, "prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    computed, compute_seconds = pair.ask(pair.first, "/v1/completions", body)
    before = pair.stats(pair.second)
    taken, take_seconds = pair.ask(pair.second, "/v1/completions", body, holder=pair.first)
    after = pair.stats(pair.second)
    cached = taken["usage"]["prompt_tokens_details"]["cached_tokens"]
    if computed["usage"]["prompt_tokens_details"]["cached_tokens"] or cached < (len(tokens) - 1) // PAGE * PAGE:
        raise SystemExit(f"{cached} of {len(tokens)} tokens were cached; the pages did not travel")
    return {
        "compute": compute_seconds,
        "take": take_seconds,
        "fetch": after.fetch_seconds - before.fetch_seconds,
        "pages": after.fetched_pages - before.fetched_pages,
        "bytes": after.fetched_bytes - before.fetched_bytes,
        "same": computed["choices"][0]["text"] == taken["choices"][0]["text"],
    }


def run_dtype(dtype: str, args: argparse.Namespace, bar: Any) -> list[Row]:
    config = EngineConfig(kv_cache_dtype=dtype, kv_cache_memory=parse_bytes(args.kv_cache_memory))
    replica = ReplicaOptions(args.model, config, ServerOptions(served_model_name=args.model), threads=args.threads)
    start(replica, ClusterOptions(min_replicas=2, max_replicas=2), "127.0.0.1", args.port)
    pair = Pair()
    for name in (pair.first, pair.second):
        pair.ask(name, "/v1/completions", {"model": args.model, "prompt": "Hello", "max_tokens": 2})
    body = {"model": args.model, "prompt": args.text.read_text("utf-8")[: 8 * sum(args.tokens) * (args.repeats + 1)]}
    text, at, rows = pair.ask(pair.first, "/tokenize", body)[0]["tokens"], 0, []
    for length in args.tokens:
        for _ in range(args.repeats):
            # Not a whole number of pages: the last ones are computed by whoever answers.
            prompt = text[at : at + length + 1]
            if len(prompt) <= length:
                raise SystemExit(f"'{args.text}' is too short")
            rows.append({"dtype": dtype, "tokens": length, **measure(pair, args.model, prompt)})
            at += length + 1
            bar.update()
    serve.delete(APPLICATION)
    return rows


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=3, help="prompts of each length; medians are reported")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k not in ("json", "kv_cache_dtype")})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.WARNING)
    with tqdm(total=len(args.kv_cache_dtype) * len(args.tokens) * args.repeats, unit="prompt", leave=False) as bar:
        for dtype in args.kv_cache_dtype:
            if not stored.has(dtype):
                connect(None)
                stored.add(dtype, {"prompts": run_dtype(dtype, args, bar)})
    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()
    rows = []
    for dtype in args.kv_cache_dtype:
        for length in args.tokens:
            found = [row for row in stored.cases[dtype]["prompts"] if row["tokens"] == length]
            median = {key: statistics.median(row[key] for row in found) for key in ("compute", "take", "fetch")}
            rows.append(
                {
                    "cache": dtype,
                    "prompt tokens": length,
                    "pages": found[0]["pages"],
                    "MB sent": round(found[0]["bytes"] / 1e6, 2),
                    "computed, ms": round(1000 * median["compute"], 1),
                    "taken, ms": round(1000 * median["take"], 1),
                    "of that fetching, ms": round(1000 * median["fetch"], 1),
                    "times faster": round(median["compute"] / median["take"], 1),
                    "same token": f"{sum(row['same'] for row in found)} of {len(found)}",
                }
            )
    stored.finish("A prompt computed on one replica, asked of another", rows)


if __name__ == "__main__":
    main()
