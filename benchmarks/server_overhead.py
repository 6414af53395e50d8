"""What HTTP, JSON and streams cost: the same prompts through the server and through ``kvbits.LLM``, taking turns.

    python benchmarks/server_overhead.py --json out/overhead.json --text book.txt

All prompts of a round are given at once. Prefix caching is off. The server is a process of its own, and its clients
run in this one, on the same cores. Figures are medians of the rounds; a round that was done is kept.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from loads import Stored, run_load, source_of
from servers import common_arguments, kvbits_command, serving

from kvbits import LLM, SamplingParams
from kvbits.replay.run import Load
from kvbits.replay.trace import TraceRequest


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--kv-cache-dtype", default="int4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k not in ("json", "rounds")})
    torch.set_num_threads(args.threads)
    cache = {"kv_cache_dtype": args.kv_cache_dtype, "kv_cache_memory": args.kv_cache_memory}
    flags = [part for name, value in cache.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = kvbits_command(args.model, *flags, "--threads", str(args.threads), "--no-enable-prefix-caching")
    llm = LLM(args.model, **cache, enable_prefix_caching=False, progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=args.new_tokens, ignore_eos=True)
    load = Load(extra=(("temperature", 0.0), ("ignore_eos", True)))
    with serving(command) as server:
        source = source_of(server.target, args.text)
        requests = [TraceRequest(0.0, args.prompt_tokens, args.new_tokens) for _ in range(args.batch)]

        def library(prompts: list[list[int]]) -> float:
            begin = time.perf_counter()
            llm.generate(prompts, params)
            return args.batch * args.new_tokens / (time.perf_counter() - begin)

        def remote(prompts: list[list[int]]) -> float:
            outcome, figures = run_load(server.target, requests, prompts, load, "server")
            if figures["failed"]:
                raise SystemExit(f"requests failed: {figures['failures']}")
            return args.batch * args.new_tokens / outcome.seconds

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
