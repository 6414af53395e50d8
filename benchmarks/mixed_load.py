"""What long prompts do to those who are waiting for their next token, by the step's token budget.

    python benchmarks/mixed_load.py --json out/mixed_load.json [--max-num-batched-tokens 128 256 512 1024 2048]

``--decoding`` sequences decode; meanwhile ``--prefills`` prompts of real text come in, the next one as soon as the one
before has its first token, so that a prompt is under way all the time. Measured is the time between two tokens of each
decoding sequence as they leave the engine (a sequence left out of a step would show as a longer one), for each
budget, and without any prompt; and what the prompts get. Budgets and dtypes take turns in every round; percentiles are
over all tokens of all rounds. The decoding sequences' caches are filled with copies of really computed pages
(benchmarks/filled.py).
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, field

import numpy as np
from filled import FilledEngine, Sample, sample_pages, text_tokens
from matplotlib.figure import Figure
from report import COLOURS, Row, facts_of, model_parser, note, publish

from kvbits.config import WEIGHT_FORMATS
from kvbits.engine.params import SamplingParams
from kvbits.evaluation.speed import WARM_UP, distinct_prompts
from kvbits.models import LoadedModel, load_model

ALONE = 0
"""Stands for a run without prompts."""


@dataclass
class Found:
    """Seconds between tokens, seconds to first token of each prompt, prompt tokens per second of each round."""

    between: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)


def run(filled: FilledEngine, budget: int, prompts: list[list[int]], args: argparse.Namespace, found: Found) -> None:
    """One round with one budget; the engine is empty before and after."""
    engine = filled.engine
    decoding = set(filled.fill([args.context] * args.decoding))
    engine.scheduler.max_num_batched_tokens = budget or 512
    for _ in range(WARM_UP):
        filled.step()
    last = dict.fromkeys(decoding, time.perf_counter())
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    begun = sent = time.perf_counter()
    waiting = list(enumerate(prompts)) if budget else []
    current: str | None = None
    steps = 0
    while waiting or current or (not budget and steps < args.alone_steps):
        if current is None and waiting:
            number, prompt = waiting.pop(0)
            sent = time.perf_counter()
            current = engine.add_request(prompt, params, request_id=f"prompt-{number}")
        _, deltas = filled.step()
        steps += 1
        now = time.perf_counter()
        for delta in deltas:
            if delta.request_id in decoding and delta.token_ids:
                found.between.append(now - last[delta.request_id])
                last[delta.request_id] = now
            elif delta.request_id == current and delta.token_ids:
                found.first.append(now - sent)
                engine.abort(current)
                current = None
    if budget:
        found.prefill.append(sum(map(len, prompts)) / (time.perf_counter() - begun))
    filled.clear()


def measure(loaded: LoadedModel, args: argparse.Namespace) -> dict[tuple[str, int], Found]:
    samples: dict[str, Sample] = {dtype: sample_pages(loaded, dtype) for dtype in args.dtype}
    prompts = distinct_prompts(text_tokens(loaded), args.prompt_tokens, max(2, args.prefills))[: args.prefills]
    least = min(args.max_num_batched_tokens)
    along = args.prefills * (args.prompt_tokens // max(least - args.decoding, 64) + 2)
    longest = args.context + 1 + WARM_UP + max(along, args.alone_steps) + 1
    if max(longest, args.prompt_tokens + 2) > loaded.geometry.max_position:
        raise SystemExit(f"the sequences reach {longest} tokens; {loaded.name} has {loaded.geometry.max_position}")
    longest = max(longest, args.prompt_tokens + 2)
    engines = {d: FilledEngine(loaded, d, args.decoding + 1, longest, sample) for d, sample in samples.items()}
    found = {(dtype, budget): Found() for budget in [ALONE, *args.max_num_batched_tokens] for dtype in args.dtype}
    for turn in range(args.rounds):
        for (dtype, budget), kept in found.items() if turn % 2 == 0 else reversed(found.items()):
            run(engines[dtype], budget, prompts, args, kept)
            gc.collect()
            worst = 1e3 * max(kept.between)
            note(f"{turn + 1}/{args.rounds}  {dtype:<6} budget {budget or 'none':<5} longest wait {worst:.0f} ms")
    return found


def rows_of(found: dict[tuple[str, int], Found]) -> list[Row]:
    rows: list[Row] = []
    for (dtype, budget), kept in found.items():
        p50, p90, p99, most = (1e3 * float(q) for q in np.quantile(kept.between, (0.5, 0.9, 0.99, 1)))
        alone = 1e3 * float(np.median(found[dtype, ALONE].between))
        rows.append(
            {
                "dtype": dtype,
                "budget": budget or "no prompts",
                "tokens": len(kept.between),
                "itl_p50_ms": p50,
                "itl_p90_ms": p90,
                "itl_p99_ms": p99,
                "itl_max_ms": most,
                "p50_over_alone": p50 / alone,
                "ttft_p50_s": float(np.median(kept.first)) if kept.first else "-",
                "prompt_tokens_per_s": float(np.median(kept.prefill)) if kept.prefill else "-",
                "prompt_tokens_per_s_min": min(kept.prefill, default="-"),
                "prompt_tokens_per_s_max": max(kept.prefill, default="-"),
            }
        )
    return rows


def picture(rows: list[Row], args: argparse.Namespace) -> Figure:
    """Waits above the budget: median, 90th and 99th percentile; and the prompts' speed."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ["no prompts", *args.max_num_batched_tokens]
    for index, dtype in enumerate(args.dtype):
        own = [row for row in rows if row["dtype"] == dtype]
        colour = COLOURS[index % len(COLOURS)]
        place = [names.index(row["budget"]) + (index - (len(args.dtype) - 1) / 2) * 0.16 for row in own]
        middle = [row["itl_p50_ms"] for row in own]
        above = [[0.0] * len(own), [row["itl_p99_ms"] - row["itl_p50_ms"] for row in own]]
        left.errorbar(place, middle, yerr=above, fmt="o", ms=5, capsize=4, color=colour, label=dtype)
        left.plot(place, [row["itl_p90_ms"] for row in own], ls="", marker="_", ms=9, color=colour)
        left.plot(place, [row["itl_max_ms"] for row in own], ls="", marker="x", ms=4, color=colour)
        with_prompts = [row for row in own if row["budget"] != "no prompts"]
        speed = [row["prompt_tokens_per_s"] for row in with_prompts]
        low = [row["prompt_tokens_per_s"] - row["prompt_tokens_per_s_min"] for row in with_prompts]
        high = [row["prompt_tokens_per_s_max"] - row["prompt_tokens_per_s"] for row in with_prompts]
        right.errorbar(
            [names.index(row["budget"]) for row in with_prompts],
            speed,
            yerr=[low, high],
            marker="o",
            ms=4,
            capsize=3,
            color=colour,
            label=dtype,
        )
    left.set_yscale("log")
    left.set_ylabel("between two tokens, ms\n(dot: median, dash: p90, whisker: p99, cross: longest)", fontsize=8)
    right.set_ylabel("prompt tokens per second")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel("token budget of a step", fontsize=9)
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--weights", default="bf16", choices=WEIGHT_FORMATS)
    parser.add_argument("--decoding", type=int, default=8, metavar="N", help="sequences that decode")
    parser.add_argument("--context", type=int, default=2048, help="tokens that each of them has")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--prefills", type=int, default=2, help="prompts of a round")
    parser.add_argument("--max-num-batched-tokens", nargs="+", type=int, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--alone-steps", type=int, default=32, help="steps of a round without prompts")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found = measure(load_model(args.model, weights=args.weights, progress=note), args)
    rows = rows_of(found)
    notes = "Time between two tokens of the decoding sequences (itl), and what the prompts get meanwhile."
    publish(
        "Decoding while prompts come in",
        {"rows": rows},
        facts_of(args),
        args.json,
        picture(rows, args),
        notes,
        args.picture,
    )


if __name__ == "__main__":
    main()
