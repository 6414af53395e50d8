"""Is decode attention balanced: one long session beside short ones, and one long session on several threads?

    python benchmarks/unequal.py --json out/unequal.json

On synthetic pages (as benchmarks/attention.py). "unequal" is one session of --long tokens beside --short ones of
--short-context; "equal" as many sessions of the mean length, so with the same number of cached tokens. "alone" is the
long session by itself. The ratio of unequal to equal is 1 where no thread waits for the long session; the time of one
thread over that of two is 2 where the pages of one session are split well and memory is not yet the limit. All dtypes,
cases and numbers of threads take turns in one run; medians, least and greatest.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from attention import GEOMETRIES, LAYERS, make_case
from matplotlib.figure import Figure
from report import COLOURS, Row, facts_of, note, plain_parser, publish, spread

from kvbits.config import PAGE_TOKENS
from kvbits.kernels.cpu import available_isas


def contexts_of(args: argparse.Namespace) -> dict[str, list[int]]:
    """The sessions of each case, in whole pages, the same number of them in "unequal" and "equal"."""
    unequal = [args.long] + [args.short_context] * args.short
    pages = sum(context // PAGE_TOKENS for context in unequal)
    each, more = divmod(pages, len(unequal))
    equal = [(each + (s < more)) * PAGE_TOKENS for s in range(len(unequal))]
    return {"unequal": unequal, "equal": equal, "alone": [args.long]}


def measure(args: argparse.Namespace) -> dict[tuple[str, str, int], list[float]]:
    """Seconds of all layers of the geometry, by dtype, case and threads."""
    note("filling the pools ...")
    cases = {
        (dtype, name, count): make_case(args.geometry, dtype, args.isa, contexts, "decode", args.max_bytes, count)
        for name, contexts in contexts_of(args).items()
        for dtype in args.dtype
        for count in (args.threads if name == "alone" else [max(args.threads)])
    }
    times: dict[tuple[str, str, int], list[float]] = {key: [] for key in cases}
    for repeat in range(args.repeats + 1):
        note("warm-up" if repeat == 0 else f"{repeat}/{args.repeats}")
        for key, case in cases.items():
            seconds = case.step() * LAYERS[args.geometry] / len(case.pool.layers)
            if repeat:
                times[key].append(seconds)
    return times


def rows_of(times: dict[tuple[str, str, int], list[float]], args: argparse.Namespace) -> list[Row]:
    most = max(args.threads)
    sessions = contexts_of(args)
    rows: list[Row] = []
    for (dtype, name, threads), seconds in times.items():
        base = times[dtype, "equal", most] if name == "unequal" else times[dtype, "alone", min(args.threads)]
        ratio = statistics.median(seconds) / statistics.median(base)
        row: Row = {
            "dtype": dtype,
            "case": name,
            "sessions": len(sessions[name]),
            "tokens": sum(sessions[name]),
            "threads": threads,
        }
        row |= spread("ms", seconds, 1e3)
        row["time_over_equal"] = ratio if name == "unequal" else "-"
        row["speedup_over_fewest_threads"] = 1 / ratio if name == "alone" else "-"
        rows.append(row)
    order = [*contexts_of(args)]
    return sorted(rows, key=lambda row: (order.index(row["case"]), args.dtype.index(row["dtype"]), row["threads"]))


def picture(rows: list[Row], args: argparse.Namespace) -> Figure:
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names, title in (
        (left, ("equal", "unequal"), "same number of cached tokens"),
        (right, ("alone",), f"one session of {args.long:,} tokens"),
    ):
        bars = sorted({(row["case"], row["threads"]) for row in rows if row["case"] in names})
        width = 0.8 / len(bars)
        for index, (name, threads) in enumerate(bars):
            shown = {row["dtype"]: row for row in rows if (row["case"], row["threads"]) == (name, threads)}
            middle = [shown[dtype]["ms"] for dtype in args.dtype]
            low = [shown[dtype]["ms"] - shown[dtype]["ms_min"] for dtype in args.dtype]
            high = [shown[dtype]["ms_max"] - shown[dtype]["ms"] for dtype in args.dtype]
            place = [d + (index - (len(bars) - 1) / 2) * width for d in range(len(args.dtype))]
            label = name if name != "alone" else f"{threads} thread{'s' * (threads > 1)}"
            axes.bar(place, middle, width, yerr=[low, high], capsize=3, label=label, color=COLOURS[index])
        axes.set_xticks(range(len(args.dtype)), args.dtype)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("decode attention, ms a step")
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--geometry", default="smollm2", choices=GEOMETRIES)
    parser.add_argument("--long", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--short", type=int, default=7, metavar="N")
    parser.add_argument("--short-context", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--isa", default=available_isas()[0], choices=available_isas())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--max-bytes", type=int, default=1 << 30, help="as in attention.py")
    args = parser.parse_args()
    if min(args.long, args.short_context) < 2 * PAGE_TOKENS:
        parser.error(f"contexts must have at least {2 * PAGE_TOKENS} tokens")
    rows = rows_of(measure(args), args)
    unequal = f"{args.long} + {args.short} x {args.short_context} tokens"
    notes = f"Unequal: {unequal}; equal: as many sessions of the mean length. Medians, least and greatest."
    publish(
        "Balance of decode attention",
        {"rows": rows},
        facts_of(args),
        args.json,
        picture(rows, args),
        notes,
        args.picture,
    )


if __name__ == "__main__":
    main()
