"""A production trace against a full pool: hits of what its hashes allow, and the same answers without a cache.

    python benchmarks/mooncake.py --json out/mooncake.json --trace mooncake_conversation_trace.jsonl --text book.txt

The first ``--requests`` of the trace that fit the context are sent as fast as the server takes them, in their order,
with ``--concurrency`` open at once. What the hashes allow is a simulation of a least-recently-used cache of as many
pages as the pool has. ``--new-tokens`` cuts the answers, which the result says; the runs with and without the cache are
kept apart, so an interrupted benchmark goes on with the one that is missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import httpx
from loads import Stored, run_load, sampled, source_of
from report import Row
from servers import Serving, common_arguments, kvbits_command, serving

from kvbits.replay.ideal import allowed_hits
from kvbits.replay.run import LoadShape
from kvbits.replay.trace import TraceRequest, capped, fitting, read_trace

PAGE = 64


def chosen(args: argparse.Namespace, context: int | None) -> list[TraceRequest]:
    """The requests that are sent; those that fit are chosen with their whole answers."""
    return capped(fitting(read_trace(args.trace), context)[: args.requests], args.new_tokens)


def run(server: Serving, args: argparse.Namespace, label: str) -> Row:
    requests = chosen(args, server.target.context)
    source = source_of(server.target, args.text)
    prompts = [source.prompt(request) for request in requests]
    extra = (("temperature", 0.0), ("ignore_eos", True))
    url = server.target.url + "/kvbits/state"

    def look() -> Row:
        pool = httpx.get(url, timeout=600).json()["pool"]
        return {name: pool[name] for name in ("free", "cached", "frames")} | {"rss": server.rss()}

    with sampled(look, 2.0) as samples:
        outcome, figures = run_load(
            server.target, requests, prompts, LoadShape(concurrency=args.concurrency, extra=extra), label
        )
    metrics = server.metrics()
    return figures | {
        "frames": samples[-1]["frames"] if samples else None,
        "least_free_frames": min((s["free"] for s in samples), default=None),
        "samples": samples,
        "preemptions": metrics["vllm:num_preemptions_total"],
        "evictions": metrics["kvbits:cached_pages_evicted_total"],
        "records": [record.as_json() for record in outcome.records],
    }


def row_of(name: str, case: Row) -> Row:
    full = [s for s in case["samples"] if s["free"] <= 0.02 * s["frames"]]
    return {
        "caching": name,
        "completed": case["completed"],
        "failed": case["failed"],
        "minutes": case["seconds"] / 60,
        "prompt tokens": case["prompt_tokens"],
        "new tokens": case["output_tokens"],
        "new tokens/s": case["output_tokens_per_s"],
        "hit rate": case["cached_share"],
        "ttft p50, s": case["ttft"]["p50"],
        "ttft p99, s": case["ttft"]["p99"],
        "pages evicted": case["evictions"],
        "preemptions": case["preemptions"],
        "pool full, share of the time": len(full) / max(1, len(case["samples"])),
    }


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="text that the prompts are cut from")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=None, help="cut longer answers; default: as the trace says")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--kv-cache-dtype", default="int4")
    parser.add_argument("--batch-invariant", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", choices=("on", "off"), help="one of the two runs")
    args = parser.parse_args()
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k not in ("json", "only")})
    flags = ["--kv-cache-dtype", args.kv_cache_dtype, "--kv-cache-memory", args.kv_cache_memory]
    flags += ["--threads", str(args.threads)] + (["--batch-invariant"] if args.batch_invariant else [])
    for name, more in (("on", []), ("off", ["--no-enable-prefix-caching"])):
        if args.only in (None, name) and not stored.has(name):
            with serving(kvbits_command(args.model, *flags, *more)) as server:
                stored.add(name, run(server, args, f"caching {name}") | {"context": server.target.context})
    case = next(iter(stored.cases.values()))
    requests = chosen(args, case["context"])
    asked = sum(r.prompt_tokens for r in requests)
    allowed = sum(allowed_hits(requests, PAGE, case["frames"])) / asked
    endless = sum(allowed_hits(requests, PAGE)) / asked
    notes = [
        f"- The pool has {case['frames']:,} pages of {PAGE} tokens; for that size the hashes allow a hit rate of "
        f"{100 * allowed:.1f} %, for an endless cache {100 * endless:.1f} %.",
        f"- Answers: {'as long as in the trace' if args.new_tokens is None else f'cut to {args.new_tokens} tokens'}; "
        f"{len(requests)} requests.",
    ]
    if "on" in stored.cases:
        share = stored.cases["on"]["cached_share"]
        notes.append(f"- Found: {100 * share:.1f} %, {100 * (share - allowed):+.1f} points.")
    if len(stored.cases) == 2:
        pairs = zip(stored.cases["on"]["records"], stored.cases["off"]["records"], strict=True)
        same = sum(a["digest"] == b["digest"] and not a["error"] for a, b in pairs)
        notes.append(f"- The same answer with and without caching: {same} of {len(requests)}.")
    stored.finish("Mooncake's conversation trace", [row_of(n, c) for n, c in stored.cases.items()], notes)


if __name__ == "__main__":
    main()
