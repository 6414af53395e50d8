"""Decode speed while other processes compute beside it: how much more is lost than the cores that they take?

    python benchmarks/busy_machine.py --json out/busy_machine.json [--others 0 1 2] [--context 512 4096]

The others are loops of Python. Rounds go through all numbers of them; figures are medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from filled import FilledEngine, sample_pages
from report import Row, bars, facts_of, model_parser, note, publish

from kvbits.models import LoadedModel, load_model


@contextmanager
def others(count: int) -> Iterator[None]:
    """``count`` processes that compute."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)  # they have started
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(loaded: LoadedModel, args: argparse.Namespace) -> list[Row]:
    sample = sample_pages(loaded, args.kv_cache_dtype)
    times: dict[tuple[int, int], list[float]] = {}
    for context in args.context:
        steps = args.rounds * len(args.others) * args.steps
        filled = FilledEngine(loaded, args.kv_cache_dtype, 1, context + steps + 8, sample)
        filled.fill([context])
        for _ in range(4):
            filled.step()
        for _ in range(args.rounds):
            for count in args.others:
                with others(count):
                    begin = time.perf_counter()
                    for _ in range(args.steps):
                        filled.step()
                    times.setdefault((context, count), []).append((time.perf_counter() - begin) / args.steps)
        filled.clear()
    rows: list[Row] = []
    for (context, count), seconds in times.items():
        speed = 1 / statistics.median(seconds)
        alone = 1 / statistics.median(times[context, args.others[0]])
        rows.append(
            {
                "context": context,
                "others": count,
                "tokens_per_s": speed,
                "least": 1 / max(seconds),
                "greatest": 1 / min(seconds),
                "of_first": speed / alone,
            }
        )
    return rows


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--others", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--context", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--kv-cache-dtype", default="int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=48, help="decode steps of a round")
    args = parser.parse_args()
    rows = measure(load_model(args.model, progress=note), args)
    notes = "One sequence. Medians, least and greatest of rounds."
    figure = bars("Decode beside other processes", rows, ("context", "others"), "tokens_per_s")
    publish("Decode beside other processes", {"rows": rows}, facts_of(args), args.json, figure, notes, args.picture)


if __name__ == "__main__":
    main()
