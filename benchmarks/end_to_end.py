"""Prefill and decode of the whole engine: batch x context, per cache dtype and format of the weights.

    python benchmarks/end_to_end.py --json out/end_to_end.json [--batch 1 8 32] [--context 512 4096 7680]

The engine runs in this process, as in ``kvbits bench``. Prefill: prompts of real text are computed, as many of a batch
as fit ``--prefill-tokens`` (they are computed one after another, so more of them say the same; batches that come to the
same prompts share the measurement). Decode: ``--steps`` steps of all sequences after two that are not timed; the caches
are filled with copies of really computed pages, each sequence its own (benchmarks/filled.py), because computing 32 x
7,680 tokens takes minutes and changes no decode step. In every round all dtypes take their turn; figures are medians,
of rounds for prefill and of single steps for decode, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import gc
import statistics

from filled import FilledEngine, Sample, sample_pages, text_tokens
from matplotlib.figure import Figure
from report import COLOURS, Row, facts_of, model_parser, note, publish, spread

from kvbits.config import WEIGHT_FORMATS
from kvbits.evaluation.speed import WARM_UP, distinct_prompts, measure_speed
from kvbits.models import LoadedModel, load_model


def prefill(loaded: LoadedModel, dtype: str, prompts: int, context: int, args: argparse.Namespace) -> float:
    """Tokens per second of computing ``prompts`` prompts."""
    chosen = distinct_prompts(text_tokens(loaded), context, prompts)
    return measure_speed(loaded, loaded.policy(dtype), chosen, 1, args.max_num_batched_tokens).prefill_tokens_per_s


def decode(
    loaded: LoadedModel, dtype: str, batch: int, context: int, sample: Sample, args: argparse.Namespace
) -> list[float]:
    """Seconds of each timed step."""
    longest = context + 1 + WARM_UP + args.steps
    filled = FilledEngine(loaded, dtype, batch, longest, sample, args.max_num_batched_tokens)
    filled.fill([context] * batch)
    seconds = []
    for _ in range(WARM_UP + args.steps):
        taken, deltas = filled.step()
        assert len(deltas) == batch, (len(deltas), batch)
        seconds.append(taken)
    return seconds[WARM_UP:]


def measure(loaded: LoadedModel, weights: str, args: argparse.Namespace) -> list[Row]:
    samples = {dtype: sample_pages(loaded, dtype) for dtype in args.dtype}
    rows: list[Row] = []
    computed: dict[tuple[str, int, int], list[float]] = {}
    for batch in args.batch:
        for context in args.context:
            prompts = max(1, min(batch, args.prefill_tokens // context))
            steps: dict[str, list[float]] = {dtype: [] for dtype in args.dtype}
            for turn in range(args.rounds):
                for dtype in args.dtype if turn % 2 == 0 else reversed(args.dtype):
                    known = computed.setdefault((dtype, prompts, context), [])
                    if len(known) <= turn:
                        known.append(prefill(loaded, dtype, prompts, context, args))
                    gc.collect()  # a pool is gone before the next one comes
                    taken = decode(loaded, dtype, batch, context, samples[dtype], args)
                    gc.collect()
                    steps[dtype] += taken
                    note(
                        f"{turn + 1}/{args.rounds}  weights {weights}  {batch} x {context}  {dtype:<6} "
                        f"prefill {known[turn]:8.0f}  decode {batch / statistics.median(taken):8.1f} tok/s"
                    )
            for dtype in args.dtype:
                row: Row = {"weights": weights, "batch": batch, "context": context, "kv_dtype": dtype}
                row["prompts_computed"] = prompts
                row |= spread("prefill_tokens_per_s", computed[dtype, prompts, context])
                row |= spread("decode_tokens_per_s", [batch / seconds for seconds in steps[dtype]])
                rows.append(row | {"decode_step_ms": 1e3 * statistics.median(steps[dtype])})
    return rows


def picture(rows: list[Row], args: argparse.Namespace) -> Figure:
    """A row of panels for prefill, one for decode; a panel for each batch, bars by context, dtype and weights."""
    kinds = [(weights, dtype) for weights in args.weights for dtype in args.dtype]
    figure = Figure(figsize=(1.5 + 3.4 * len(args.batch), 6.2), layout="constrained")
    panels = figure.subplots(2, len(args.batch), squeeze=False)
    for line, name in enumerate(("prefill_tokens_per_s", "decode_tokens_per_s")):
        for column, batch in enumerate(args.batch):
            axes = panels[line][column]
            for index, (weights, dtype) in enumerate(kinds):
                shown = [
                    next(r for r in rows if (r["weights"], r["batch"], r["context"], r["kv_dtype"]) == key)
                    for key in ((weights, batch, context, dtype) for context in args.context)
                ]
                place = [c + (index - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for c in range(len(shown))]
                low = [r[name] - r[f"{name}_min"] for r in shown]
                high = [r[f"{name}_max"] - r[name] for r in shown]
                axes.bar(
                    place,
                    [r[name] for r in shown],
                    0.8 / len(kinds),
                    yerr=[low, high],
                    capsize=2,
                    label=f"{dtype}, weights {weights}",
                    color=COLOURS[args.dtype.index(dtype) % len(COLOURS)],
                    alpha=1 - 0.35 * args.weights.index(weights),
                )
            axes.set_xticks(range(len(args.context)), [f"{context:,}" for context in args.context])
            axes.set_title(f"{name.split('_')[0]}, batch {batch}", fontsize=9)
            axes.set_ylim(bottom=0)
    panels[0][0].legend(fontsize=7)
    figure.supxlabel("context, tokens", fontsize=9)
    figure.supylabel("tokens per second, all sequences", fontsize=9)
    return figure


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", nargs="+", type=int, default=[512, 4096, 7680])
    parser.add_argument("--weights", nargs="+", default=["bf16"], choices=WEIGHT_FORMATS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="timed decode steps of a round")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="most prompt tokens computed at once")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    args = parser.parse_args()
    rows: list[Row] = []
    for weights in args.weights:
        rows += measure(load_model(args.model, weights=weights, progress=note), weights, args)
    notes = "Tokens per second of all sequences together; medians, least and greatest."
    publish("End to end", {"rows": rows}, facts_of(args), args.json, picture(rows, args), notes, args.picture)


if __name__ == "__main__":
    main()
