"""Sessions that run at once, and tokens per second, of several cache dtypes in the same bytes.

    python benchmarks/concurrency.py --json out/concurrency.json --text book.txt --kv-cache-memory 256MiB

More sessions than a dtype can hold are sent at once. "running" is the mean over the time in which the pool limits: from
the most that ever ran until nobody waits any more. Give --sessions for each dtype, some times what it holds, so that
this time is long for all of them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from loads import Stored, run_load, sampled, source_of
from report import Row
from servers import Serving, common_arguments, kvbits_command, serving

from kvbits.replay.run import LoadShape
from kvbits.replay.trace import TraceRequest

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"


def run(server: Serving, args: argparse.Namespace, sessions: int, label: str) -> Row:
    source = source_of(server.target, args.text)
    requests = [TraceRequest(0.0, args.prompt_tokens, args.new_tokens) for _ in range(sessions)]
    prompts = [source.prompt(request) for request in requests]

    def look() -> Row:
        found = server.metrics()
        return {"running": found[RUNNING], "waiting": found[WAITING]}

    load = LoadShape(extra=(("temperature", 0.0), ("ignore_eos", True)))
    with sampled(look, 0.5) as samples:
        _, figures = run_load(server.target, requests, prompts, load, label)
    most = max(s["running"] for s in samples)
    first = next(i for i, s in enumerate(samples) if s["running"] == most)
    limited = [s["running"] for s in samples[first:] if s["waiting"] > 0]
    return figures | {
        "running": statistics.mean(limited) if limited else None,
        "most_running": most,
        "preemptions": server.metrics()["vllm:num_preemptions_total"],
    }


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--kv-cache-dtype", nargs="+", default=["bf16", "int8", "int4"], help="the first is compared with"
    )
    parser.add_argument("--sessions", type=int, nargs="+", default=[64], help="for all dtypes, or for each")
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    if len(args.sessions) not in (1, len(args.kv_cache_dtype)):
        parser.error(f"--sessions has {len(args.sessions)} numbers for {len(args.kv_cache_dtype)} dtypes")
    sessions = dict(zip(args.kv_cache_dtype, args.sessions * len(args.kv_cache_dtype), strict=False))
    left_out = ("json", "kv_cache_dtype")
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k not in left_out})
    for dtype in args.kv_cache_dtype:
        if not stored.has(dtype):
            flags = [
                "--kv-cache-dtype",
                dtype,
                "--kv-cache-memory",
                args.kv_cache_memory,
                "--threads",
                str(args.threads),
            ]
            flags += ["--max-num-seqs", str(sessions[dtype]), "--no-enable-prefix-caching"]
            with serving(kvbits_command(args.model, *flags)) as server:
                stored.add(dtype, run(server, args, sessions[dtype], dtype))
    cases = {dtype: stored.cases[dtype] for dtype in args.kv_cache_dtype}
    base = cases[args.kv_cache_dtype[0]]
    rows = [
        {
            "dtype": dtype,
            "sessions": sessions[dtype],
            "running": case["running"] or case["most_running"],
            "times": (case["running"] or case["most_running"]) / (base["running"] or base["most_running"]),
            "most running": case["most_running"],
            "new tokens/s": case["output_tokens_per_s"],
            "times as fast": case["output_tokens_per_s"] / base["output_tokens_per_s"],
            "ttft p50, s": case["ttft"]["p50"],
            "itl p99, ms": 1000 * case["itl"]["p99"],
            "preemptions": case["preemptions"],
            "failed": case["failed"],
        }
        for dtype, case in cases.items()
    ]
    size = f"{args.prompt_tokens} + {args.new_tokens} tokens"
    note = f"- Sessions of {size}, {args.kv_cache_memory} of cache."
    unlimited = [dtype for dtype, case in cases.items() if case["running"] is None]
    more = [f"- The pool did not limit {', '.join(unlimited)}: all sessions ran at once."] if unlimited else []
    stored.finish("Sessions at once in the same bytes", rows, [note, *more])


if __name__ == "__main__":
    main()
