"""How cost grows with the work: time of a decode step with the cached tokens, memory with the sessions.

    python benchmarks/cost_growth.py --json out/cost_growth.json

Time: ``--batch`` sequences decode at each of the contexts, all dtypes in turns; a straight line is fitted to the
medians (least squares). Its slope is the time that one more cached token costs a step; beside it the time in which its
bytes can be read at the machine's read bandwidth: what the slope would be if reading were all. Memory: sessions of
``--session`` tokens are added to one engine; the frames that they hold, and by how much the process has grown. Caches
are filled with copies of really computed pages, each session its own (benchmarks/filled.py).
"""

from __future__ import annotations

import argparse
import gc
import statistics

import numpy as np
import psutil
from bandwidth import read_bandwidth
from filled import FilledEngine, Sample, sample_pages
from matplotlib.figure import Figure
from report import COLOURS, Row, facts_of, model_parser, note, publish

from kvbits.config import WEIGHT_FORMATS
from kvbits.evaluation.speed import WARM_UP
from kvbits.models import LoadedModel, load_model


def step_times(loaded: LoadedModel, samples: dict[str, Sample], args: argparse.Namespace) -> list[Row]:
    """A row for each context and dtype."""
    rows: list[Row] = []
    for context in args.context:
        longest = context + 1 + WARM_UP + args.steps
        engines = {dtype: FilledEngine(loaded, dtype, args.batch, longest, sample) for dtype, sample in samples.items()}
        for filled in engines.values():
            filled.fill([context] * args.batch)
        times: dict[str, list[float]] = {dtype: [] for dtype in engines}
        for step in range(WARM_UP + args.steps):
            for dtype, filled in engines.items():
                seconds, deltas = filled.step()
                assert len(deltas) == args.batch, (len(deltas), args.batch)
                if step >= WARM_UP:
                    times[dtype].append(seconds)
        # The middle of the timed steps.
        tokens = args.batch * (context + WARM_UP + args.steps // 2)
        for dtype, taken in times.items():
            low, middle, high = (1e3 * float(q) for q in np.quantile(taken, (0.25, 0.5, 0.75)))
            rows.append({"dtype": dtype, "cached_tokens": tokens, "step_ms": middle, "q1_ms": low, "q3_ms": high})
        note(
            f"{args.batch} x {context}: "
            + ", ".join(f"{r['dtype']} {r['step_ms']:.1f} ms" for r in rows[-len(times) :])
        )
        del engines, filled
        gc.collect()
    return rows


def lines(rows: list[Row], loaded: LoadedModel, bandwidth: float, samples: dict[str, Sample]) -> list[Row]:
    """The straight line of each dtype. ``slope_over_bytes``: 1 where a token costs what reading its bytes costs."""
    found: list[Row] = []
    for dtype, sample in samples.items():
        own = [row for row in rows if row["dtype"] == dtype]
        tokens = np.array([row["cached_tokens"] for row in own], dtype=float)
        times = np.array([row["step_ms"] for row in own])
        slope, start = np.polyfit(tokens, times, 1)
        rest = times - (slope * tokens + start)
        nbytes = FilledEngine(loaded, dtype, 1, 128, sample).engine.pool.bytes_per_token()
        ideal = nbytes / bandwidth * 1e9
        found.append(
            {
                "dtype": dtype,
                "ns_per_token": float(slope) * 1e6,
                "bytes_per_token": nbytes,
                "ns_to_read_them": ideal,
                "slope_over_bytes": float(slope) * 1e6 / ideal,
                "ms_without_cache": float(start),
                "r_squared": float(1 - rest.var() / times.var()),
                "furthest_from_line_ms": float(np.abs(rest).max()),
            }
        )
    return found


def memory(loaded: LoadedModel, samples: dict[str, Sample], args: argparse.Namespace) -> list[Row]:
    """Frames and resident memory by the number of sessions."""
    process = psutil.Process()
    rows: list[Row] = []
    for dtype, sample in samples.items():
        gc.collect()
        before = process.memory_info().rss
        longest = args.session + len(args.sessions) + 2
        filled = FilledEngine(loaded, dtype, max(args.sessions), longest, sample)
        pool = filled.engine.pool
        there = 0
        for sessions in args.sessions:
            filled.fill([args.session] * (sessions - there))
            there = sessions
            load = filled.engine.load()
            used = pool.layout.bytes_of(load.frames - load.frames_available) / 2**20
            rows.append(
                {
                    "dtype": dtype,
                    "sessions": sessions,
                    "pool_MiB": used,
                    "process_grew_MiB": (process.memory_info().rss - before) / 2**20,
                    "pool_MiB_per_session": used / sessions,
                    "sealed_bytes_only_MiB": sessions * args.session * pool.bytes_per_token() / 2**20,
                }
            )
        note(f"memory {dtype}: {rows[-1]['pool_MiB']:.0f} MiB for {there} sessions")
        del filled, pool
    return rows


def picture(rows: list[Row], fits: list[Row], held: list[Row], args: argparse.Namespace) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, fit in enumerate(fits):
        dtype, colour = fit["dtype"], COLOURS[index % len(COLOURS)]
        own = [row for row in rows if row["dtype"] == dtype]
        x = np.array([row["cached_tokens"] for row in own])
        y = [row["step_ms"] for row in own]
        noise = [[row["step_ms"] - row["q1_ms"] for row in own], [row["q3_ms"] - row["step_ms"] for row in own]]
        left.errorbar(x, y, yerr=noise, fmt="o", ms=4, capsize=3, color=colour)
        ends = np.array([0, x.max()])
        label = f"{dtype}: {fit['ns_per_token']:.0f} ns a token"
        left.plot(ends, fit["ms_without_cache"] + fit["ns_per_token"] * ends / 1e6, color=colour, label=label)
        reading = fit["ms_without_cache"] + fit["ns_to_read_them"] * ends / 1e6
        left.plot(ends, reading, color=colour, ls=":", lw=1)
        mine = [row for row in held if row["dtype"] == dtype]
        sessions = [row["sessions"] for row in mine]
        right.plot(
            sessions, [row["pool_MiB"] for row in mine], marker="o", ms=4, color=colour, label=f"{dtype}, frames"
        )
        right.plot(
            sessions, [row["process_grew_MiB"] for row in mine], ls="--", color=colour, label=f"{dtype}, process"
        )
    left.set_xlabel(f"cached tokens of all {args.batch} sequences (dotted: bytes at read bandwidth)")
    left.set_ylabel("decode step, ms (bars: quartiles)")
    right.set_xlabel(f"sessions of {args.session:,} tokens")
    right.set_ylabel("memory, MiB")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    return figure


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--weights", default="bf16", choices=WEIGHT_FORMATS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", nargs="+", type=int, default=[512, 1536, 2560, 3584, 4608, 5632, 6656, 7680])
    parser.add_argument("--steps", type=int, default=24, help="timed steps at each context")
    parser.add_argument("--session", type=int, default=4096, metavar="TOKENS", help="of the sessions in memory")
    parser.add_argument("--sessions", nargs="+", type=int, default=[1, 2, 4, 8, 12, 16])
    args = parser.parse_args()
    if len(set(args.context)) < 3:
        parser.error("a line needs three contexts or more")
    args.sessions = sorted(set(args.sessions))
    note("read bandwidth ...")
    before = read_bandwidth()
    loaded = load_model(args.model, weights=args.weights, progress=note)
    samples = {dtype: sample_pages(loaded, dtype) for dtype in args.dtype}
    rows = step_times(loaded, samples, args)
    bandwidth = statistics.mean((before, read_bandwidth()))
    fits = lines(rows, loaded, bandwidth, samples)
    held = memory(loaded, samples, args)
    notes = "Medians and quartiles of single steps; read bandwidth: mean of a measurement before and one after."
    tables = {"rows": rows, "straight_lines": fits, "memory": held}
    publish(
        "Cost as the work grows",
        tables,
        facts_of(args) | {"read_gb_per_s": bandwidth / 1e9},
        args.json,
        picture(rows, fits, held, args),
        notes,
        args.picture,
    )


if __name__ == "__main__":
    main()
