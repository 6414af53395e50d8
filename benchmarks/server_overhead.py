"""What HTTP, JSON and streams cost: the same prompts through the server and through ``kvbits.LLM``, taking turns.

    python benchmarks/server_overhead.py --json out/overhead.json --text book.txt

Both ways run on one engine, in the thread that owns it: where a process' memory happens to lie changes its speed by
more than what is measured. The clients are a process of their own, on the same cores. All prompts of a round are
given at once. Prefix caching is off. Figures are medians of the rounds; a round that was done is kept.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from loads import Stored, run_load, source_of
from servers import common_arguments

from kvbits.replay.run import LoadShape
from kvbits.replay.target import Target, find_target
from kvbits.replay.trace import TraceRequest

LOAD = LoadShape(extra=(("temperature", 0.0), ("ignore_eos", True)))


class InProcess:
    """A server in a thread of this process, and a way to run something in the thread that owns its engine."""

    def __init__(self, url: str, worker: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.target = find_target(url, None, None)
        self._worker = worker
        self._loop = loop

    def run(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``, run where the engine's steps run."""
        return asyncio.run_coroutine_threadsafe(self._worker.call(work), self._loop).result()


@contextmanager
def serving_here(engine: Any, name: str) -> Iterator[InProcess]:
    """``engine`` behind the whole application and its sockets."""
    import uvicorn

    from kvbits.server.app import create_app
    from kvbits.server.options import ServerOptions
    from kvbits.server.run import http_config

    options = ServerOptions(name)
    app = create_app(engine, options)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(http_config(app, "127.0.0.1", port, options))
        loop = (server.config.get_loop_factory() or asyncio.new_event_loop)()

        def serve() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(server.serve([listener]))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield InProcess(f"http://127.0.0.1:{port}", app.state.service.worker, loop)
        finally:
            server.should_exit = True
            thread.join(60)


def ask(target: Target, requests: list[TraceRequest], prompts: list[list[int]]) -> tuple[float, list[str]]:
    """In the clients' process: seconds until all answers are there, and the errors."""
    outcome, _ = run_load(target, requests, prompts, LOAD, "server")
    return outcome.seconds, [record.error for record in outcome.records if record.error]


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kv-cache-dtype", default="int4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k not in ("json", "rounds")})
    # As "kvbits serve" does, before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    import torch

    from kvbits import LLM, SamplingParams

    torch.set_num_threads(args.threads)
    llm = LLM(
        args.model,
        kv_cache_dtype=args.kv_cache_dtype,
        kv_cache_memory=args.kv_cache_memory,
        enable_prefix_caching=False,
        progress=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens, ignore_eos=True)
    requests = [TraceRequest(0.0, args.prompt_tokens, args.new_tokens) for _ in range(args.batch)]
    tokens = args.batch * args.new_tokens
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as clients,
        serving_here(llm.engine, args.model) as server,
    ):
        source = source_of(server.target, args.text)

        def library(prompts: list[list[int]]) -> float:
            begin = time.perf_counter()
            server.run(lambda: llm.generate(prompts, params))
            return float(tokens / (time.perf_counter() - begin))

        def remote(prompts: list[list[int]]) -> float:
            seconds, errors = clients.submit(ask, server.target, requests, prompts).result()
            if errors:
                raise SystemExit(f"requests failed: {errors}")
            return float(tokens / seconds)

        for number in range(args.rounds + 1):
            name = f"round {number}"
            prompts = [[int(t) for t in source.prompt(request)] for request in requests]
            if stored.has(name):
                continue
            both = (("library", library), ("server", remote))
            found = {label: way(prompts) for label, way in (both if number % 2 else both[::-1])}
            # The first pays for what is set up on first use.
            stored.add(name, found if number else found | {"warm_up": True})
    rounds = [case for case in stored.cases.values() if not case.get("warm_up")]
    shares = [case["server"] / case["library"] for case in rounds]
    rows = [
        {"way": way, "new tokens/s": statistics.median(case[way] for case in rounds), "rounds": len(rounds)}
        for way in ("library", "server")
    ]
    note = (
        f"- The server reaches {100 * statistics.median(shares):.1f} % of the library's throughput (rounds: "
        f"{', '.join(f'{100 * share:.1f}' for share in shares)}); {args.batch} prompts of {args.prompt_tokens} tokens, "
        f"{args.new_tokens} new ones each."
    )
    stored.finish("Server and library", rows, [note])


if __name__ == "__main__":
    main()
