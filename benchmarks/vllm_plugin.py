"""kvbits' plug-in inside vLLM beside vLLM's own caches, on the CPU, in turns.

    make test-vllm                                  # makes the environment
    python benchmarks/vllm_plugin.py MODEL_DIRECTORY --python out/vllm/bin/python --json out/vllm.json

Every measurement is an engine of its own with the machine to itself; the caches take turns at each case, and every
second repeat runs in the opposite order. ``ratio`` is a cache's decoding speed over the better of ``auto`` and ``fp8``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_engines import parse_case
from peers.case import Case, Measurement, PeerFailed, measure
from report import facts_of, publish

WORKER = Path(__file__).parent / "peers" / "workers" / "vllm_case.py"
OWN = ("auto", "fp8")
CASES = [(8, 4096), (8, 7680), (8, 512), (1, 4096)]


@dataclass(frozen=True)
class Vllm:
    """vLLM with one cache; a :class:`~peers.case.Peer`."""

    python: str
    model: str
    kv_dtype: str
    system: str = "vLLM"
    weights: str = "bf16"

    def command(self, case: Case) -> list[str]:
        numbers = map(str, (case.batch, case.context, case.new_tokens))
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: case.threads]))
        program = (self.python, str(WORKER), self.model, self.kv_dtype)
        return ["env", f"VLLM_CPU_OMP_THREADS_BIND={cores}", *program, *numbers]

    def parse(self, case: Case, output: str) -> Measurement:
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        found = json.loads(line.removeprefix("RESULT "))
        return Measurement(found["prefill"], found["decode"], case.batch)


def rows_of(found: dict[tuple[str, str], list[Measurement]]) -> list[dict[str, Any]]:
    """Medians by case and cache."""
    rows = []
    for (case, kv), runs in found.items():
        prefill, decode = (
            statistics.median(getattr(m, what) for m in runs)
            for what in ("prefill_tokens_per_s", "decode_tokens_per_s")
        )
        rows.append({"case": case, "cache": kv, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode,
                     "runs": len(runs)})  # fmt: skip
    for row in rows:
        best = [r["decode_tokens_per_s"] for r in rows if r["case"] == row["case"] and r["cache"] in OWN]
        row["ratio"] = row["decode_tokens_per_s"] / max(best) if best else None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that vLLM reads")
    parser.add_argument("--python", default="out/vllm/bin/python", help="the Python that has vLLM and kvbits")
    parser.add_argument("--caches", nargs="+", default=[*OWN, "int8", "int4"])
    parser.add_argument("--case", nargs="+", type=parse_case, default=CASES, metavar="BATCHxCONTEXT")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--json", type=Path, default=Path("out/vllm_plugin.json"))
    args = parser.parse_args()
    found: dict[tuple[str, str], list[Measurement]] = {}
    for repeat in range(args.repeats):
        for batch, context in args.case:
            case = Case(batch, context, args.new_tokens, args.threads)
            for kv in args.caches[:: -1 if repeat % 2 else 1]:
                try:
                    one = measure(Vllm(args.python, args.model, kv), case, args.timeout)
                except PeerFailed as error:
                    print(error)
                    continue
                found.setdefault((str(case), kv), []).append(one)
                print(f"{case}, {kv}: prefill {one.prefill_tokens_per_s:.0f}, decode {one.decode_tokens_per_s:.0f}")
    publish("kvbits inside vLLM", {"rows": rows_of(found)}, facts_of(args, "json", "case"), args.json)


if __name__ == "__main__":
    main()
