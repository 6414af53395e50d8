"""kvbits and llama-server under the same clients: throughput, time to first token, time between tokens.

    python benchmarks/peers/install.py
    python benchmarks/llama_server.py --json out/llama_server.json --text book.txt

Both get the same token ids: ``--clients`` requests open at once, ``--requests`` in a round, fresh text in each. The two
take turns, each with the machine to itself; figures are medians of the rounds, and rounds that were done are kept.
llama-server runs with one slot a client and the same number of threads.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from loads import Stored, run_load, source_of
from peers.install import DEFAULT_DIRECTORY, Installation
from peers.llama_cpp import f16_weights
from peers.model import packaged_gguf
from report import Row
from servers import common_arguments, kvbits_command, llama_command, serving

from kvbits.replay.run import LoadShape
from kvbits.replay.trace import TraceRequest


def commands(args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """The servers by name."""
    place = Installation(args.directory.resolve())
    program = place.llama_tool("llama-server")
    if not program.exists():
        raise SystemExit(f"there is no {program}; run benchmarks/peers/install.py")
    # Whole pages and a little room, as a server would be set up for such requests.
    context = (args.prompt_tokens + args.new_tokens + 64 + 255) // 256 * 256
    found: dict[str, Sequence[str]] = {}
    for dtype in args.kv_cache_dtype:
        flags = ["--kv-cache-dtype", dtype, "--kv-cache-memory", args.kv_cache_memory, "--threads", str(args.threads)]
        found[f"kvbits {dtype}"] = kvbits_command(args.model, *flags)
    for weights in args.llama_weights:
        gguf = f16_weights(place, args.gguf) if weights == "F16" else args.gguf
        command = llama_command(program, gguf, args.clients, context, args.llama_dtype, args.threads)
        found[f"llama-server {args.llama_dtype} {weights}"] = command
    return found


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8, help="of a round")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["int8"])
    parser.add_argument("--llama-dtype", default="q8_0")
    parser.add_argument(
        "--llama-weights", nargs="+", choices=("file", "F16"), default=["file"], help="of the GGUF file"
    )
    parser.add_argument("--gguf", type=Path, default=packaged_gguf())
    parser.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="where install.py put the peers")
    args = parser.parse_args()
    left_out = ("json", "rounds", "directory", "gguf", "kv_cache_dtype", "llama_weights")
    stored = Stored(args.json, {k: str(v) for k, v in vars(args).items() if k not in left_out})
    load = LoadShape(concurrency=args.clients, extra=(("temperature", 0.0), ("ignore_eos", True)))
    requests = [TraceRequest(0.0, args.prompt_tokens, args.new_tokens) for _ in range(args.requests)]
    servers = commands(args)
    for number in range(args.rounds):
        for name in list(servers) if number % 2 == 0 else list(reversed(servers)):
            case = f"{name}, round {number + 1}"
            if stored.has(case):
                continue
            with serving(servers[name]) as server:
                source = source_of(server.target, args.text)
                fresh = [[source.prompt(request) for request in requests] for _ in range(number + 1)]
                # One short request first: what is set up on first use is not the round's.
                run_load(server.target, [TraceRequest(0.0, 64, 8)], [fresh[0][0][:64]], load, "warm-up")
                _, figures = run_load(server.target, requests, fresh[number], load, case)
            stored.add(case, figures | {"name": name, "command": " ".join(servers[name])})
    rows = [row_of(name, [c for c in stored.cases.values() if c["name"] == name]) for name in servers]
    first, others = rows[0], rows[1:]
    notes = [
        f"- {first['server']} has {first['new tokens/s'] / other['new tokens/s']:.2f} times the throughput of "
        f"{other['server']}; its p99 between tokens is "
        f"{first['itl p99, ms'] / other['itl p99, ms']:.2f} of the other's."
        for other in others
    ]
    notes.append(
        f"- {args.clients} clients, prompts of {args.prompt_tokens} tokens, {args.new_tokens} new ones, "
        f"{args.requests} requests a round."
    )
    stored.finish("The same clients on kvbits and llama-server", rows, notes)


def row_of(name: str, cases: Sequence[Row]) -> Row:
    """Medians of the rounds; milliseconds."""

    def middle(*path: str) -> float:
        found = []
        for case in cases:
            value = case
            for key in path:
                value = value[key]
            found.append(float(value))  # type: ignore[arg-type]
        return statistics.median(found)

    return {
        "server": name,
        "new tokens/s": middle("output_tokens_per_s"),
        "prompt and new tokens/s": middle("total_tokens_per_s"),
        "ttft p50, ms": 1000 * middle("ttft", "p50"),
        "ttft p99, ms": 1000 * middle("ttft", "p99"),
        "itl p50, ms": 1000 * middle("itl", "p50"),
        "itl p99, ms": 1000 * middle("itl", "p99"),
        "failed": sum(case["failed"] for case in cases),
        "rounds": len(cases),
    }


if __name__ == "__main__":
    main()
