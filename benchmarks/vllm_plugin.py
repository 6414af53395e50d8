"""kvbits' plug-in inside vLLM beside vLLM's own caches, on the CPU, in turns.

    make test-vllm                                  # makes the environment
    python benchmarks/vllm_plugin.py MODEL_DIRECTORY --python out/vllm/bin/python --json out/vllm_plugin.json

Four engines live at once, each with its cache in as many bytes, and work one at a time: at each case every cache
decodes in turn, prompts in the prefix cache, then again in the opposite order. ``decode`` is tokens a second of the
median step, then the median of the repeats; ``ratio`` that over the better of ``auto`` and ``fp8``. The case
``prefill`` is one new prompt at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from compare_engines import parse_case
from report import facts_of, publish

WORKER = Path(__file__).parent / "peers" / "workers" / "vllm_engine.py"
OWN = ("auto", "fp8")
PAUSE = 1.2
"""Seconds between two engines: a worker of vLLM's spins for one more after its last step."""
CASES = [(8, 4096), (8, 7680), (8, 512), (1, 4096)]


class Engine:
    """A process with one vLLM engine; what it has to say beside its results goes to ``log``, in two files."""

    def __init__(self, kv: str, args: argparse.Namespace, log: Path) -> None:
        longest = max(args.prefill, *(context for _, context in args.case)) + args.steps + 64
        sizes = longest, max(batch for batch, _ in args.case), args.cache_bytes
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: args.threads]))
        self.kv, self._log = kv, log
        self._said = log.with_suffix(".out").open("w")
        self._process = subprocess.Popen(
            [args.python, str(WORKER), args.model, kv, *map(str, sizes)],
            env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": cores}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
        )  # fmt: skip
        self._result()

    def ask(self, **case: int) -> float:
        assert self._process.stdin is not None
        print(json.dumps(case), file=self._process.stdin, flush=True)
        return self._result()

    def _result(self) -> float:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return float(line.split()[1])
            self._said.write(line)
        self._said.close()
        raise SystemExit(f"vLLM with the cache {self.kv} ended; see {self._log}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def rows_of(found: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Medians by case and cache, and their ratio to vLLM's best."""
    rows = []
    for case, by_cache in found.items():
        speeds = {kv: statistics.median(runs) for kv, runs in by_cache.items()}
        best = max((speed for kv, speed in speeds.items() if kv in OWN), default=None)
        for kv, speed in speeds.items():
            runs = by_cache[kv]
            rows.append({"case": case, "cache": kv, "tokens_per_s": speed, "ratio": speed / best if best else None,
                         "least": min(runs), "most": max(runs)})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that vLLM reads")
    parser.add_argument("--python", default="out/vllm/bin/python", help="the Python that has vLLM and kvbits")
    parser.add_argument("--caches", nargs="+", default=[*OWN, "int8", "int4"])
    parser.add_argument("--case", nargs="+", type=parse_case, default=CASES, metavar="BATCHxCONTEXT")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the prompts whose prefill is timed")
    parser.add_argument("--steps", type=int, default=48, help="decode steps of a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache-bytes", type=int, default=3 << 29, help="of every engine's cache")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, default=Path("out/vllm_plugin.json"))
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    cases = {"prefill": {"prefill": args.prefill}}
    cases |= {f"{b} x {c}": {"batch": b, "context": c, "steps": args.steps} for b, c in args.case}
    found: dict[str, dict[str, list[float]]] = {case: {kv: [] for kv in args.caches} for case in cases}
    with contextlib.ExitStack() as stack:
        engines = []
        for kv in args.caches:
            engines.append(Engine(kv, args, args.json.with_suffix(f".{kv.replace(':', '_')}.log")))
            stack.callback(engines[-1].close)
        for case, asked in cases.items():
            for repeat in range(args.repeats + 1):  # the first one fills the prefix cache
                for engine in engines[:: -1 if repeat % 2 else 1]:
                    time.sleep(PAUSE)
                    speed = engine.ask(**asked)
                    if repeat:
                        found[case][engine.kv].append(speed)
                        print(f"{case}, {engine.kv}: {speed:.0f}", flush=True)
    publish("kvbits inside vLLM", {"rows": rows_of(found)}, facts_of(args, "json", "case"), args.json)


if __name__ == "__main__":
    main()
