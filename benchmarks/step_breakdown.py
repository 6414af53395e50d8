"""What one engine step is made of: a decode step of a batch, and a chunk of a prompt.

    python benchmarks/step_breakdown.py --json out/step_breakdown.json [--batch 8] [--context 7680]

How each part is obtained:

- *attention*: the fused call of every layer alone, on the pool and the batch of the step, minus *append, seal, settle*.
- *append, seal, settle*: the same call on caches in which there is nearly nothing to attend to, extrapolated to no
  query head (benchmarks/step_parts.py). It includes what the calls cost in themselves, so it is an upper bound. Sealing
  happens once in 64 steps; its 64th is in the figure and is added to the step.
- *linear layers*, *lm head*: their products alone, weights coming from memory.
- *norms, rotary, waking threads*: the rest of the native call that runs all layers (a clock around it).
- *embedding, rotary angles*: clocks around the two torch modules.
- *scheduling*, *sampling*: the engine's own clocks (``EngineStats.seconds``).
- *Python and other*: the rest of the step: building the batch, page tables, committing tokens, text.

Before a part that is called alone a large buffer is read, so that it finds memory as a step does. A prompt's chunk is
not its last, so it has no head and no sampling. dtypes take turns in every repeat; a part is formed from the medians of
a repeat; figures are medians of the repeats, with the least and the greatest. Caches are filled with copies of really
computed pages (benchmarks/filled.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

from filled import FilledEngine, sample_pages
from matplotlib.figure import Figure
from report import COLOURS, Row, facts_of, model_parser, note, publish, spread
from step_parts import Attention, Clock, Evict, Linears, Storing, median_of

from kvbits.config import WEIGHT_FORMATS
from kvbits.evaluation.speed import WARM_UP
from kvbits.kernels.cpu import CpuBackend
from kvbits.models import LoadedModel, load_model
from kvbits.models.fused import FusedModel

PARTS = (
    "attention",
    "append, seal, settle",
    "linear layers",
    "norms, rotary, waking threads",
    "lm head",
    "embedding, rotary angles",
    "scheduling",
    "sampling",
    "Python and other",
)


@dataclass
class Clocks:
    """Clocks around what a fused model calls."""

    native: Clock
    embedding: Clock
    rotary: Clock

    def take(self) -> dict[str, float]:
        return {"native": self.native.take(), "embedding": self.embedding.take() + self.rotary.take()}


def clocked(loaded: LoadedModel) -> tuple[LoadedModel, Clocks]:
    """The same model with clocks in it."""
    fused = loaded.fused
    if not isinstance(fused, FusedModel):
        raise SystemExit(f"{loaded.name} runs as transformers' own code, which has no single call to take apart")
    decoder: Any = copy(fused.decoder)
    clocks = Clocks(Clock(decoder.native), Clock(fused.embedding), Clock(fused.rope.module))
    decoder.native = clocks.native
    embedding: Any = clocks.embedding
    rope = replace(fused.rope, module=cast(Any, clocks.rotary))
    return replace(loaded, fused=replace(fused, decoder=decoder, embedding=embedding, rope=rope)), clocks


class Subject:
    """One dtype: an engine that decodes, one that gets prompts, and a backend for the parts that are called alone."""

    def __init__(self, loaded: LoadedModel, dtype: str, clocks: Clocks, args: argparse.Namespace) -> None:
        self._args, self._clocks = args, clocks
        sample = sample_pages(loaded, dtype)
        longest = args.context + 1 + WARM_UP + args.repeats * args.steps
        self._decoding = FilledEngine(loaded, dtype, args.batch, longest, sample)
        self._prefill = FilledEngine(loaded, dtype, 1, args.prompt + args.chunk + 3, sample, args.chunk)
        self._decoding.fill([args.context] * args.batch)
        for _ in range(WARM_UP):
            self._decoding.step()
        self._alone = CpuBackend()
        self._storing = Storing(self._alone, self._decoding.engine.pool, args.batch, args.chunk)

    def _step(self, filled: FilledEngine) -> dict[str, float]:
        stats = filled.engine.stats.seconds
        before = dict(stats)
        self._clocks.take()
        total, _ = filled.step()
        phases = {name: stats[name] - before[name] for name in ("schedule", "sample")}
        return {"total": total, **phases, **self._clocks.take()}

    def _attention(self, filled: FilledEngine, evict: Evict) -> float:
        assert filled.runner.batch is not None
        alone = Attention(self._alone, filled.engine.pool, filled.runner.batch.layout)
        times = []
        for _ in range(3):
            evict()
            times.append(alone.seconds())
        return median_of(times)

    def decode(self, evict: Evict, linear: float, head: float) -> dict[str, float]:
        """Seconds of each part of a decode step."""
        steps = [self._step(self._decoding) for _ in range(self._args.steps)]
        step = {name: median_of([s[name] for s in steps]) for name in steps[0]}
        attention = self._attention(self._decoding, evict)
        store, sealing = self._storing.decode(evict)
        return _parts(step, attention, store, sealing, linear, head)

    def chunk(self, evict: Evict, linear: float) -> dict[str, float]:
        """Seconds of each part of a prompt's chunk."""
        self._prefill.fill([self._args.prompt], extra=self._args.chunk + 1)
        step = self._step(self._prefill)
        attention = self._attention(self._prefill, evict)
        self._prefill.clear()
        return _parts(step, attention, self._storing.chunk(evict), 0.0, linear, 0.0)


def _parts(
    step: dict[str, float], attention: float, store: float, sealing: float, linear: float, head: float
) -> dict[str, float]:
    inside = step["native"] + step["embedding"] + step["schedule"] + step["sample"]
    values = (
        attention - store,
        store + sealing,
        linear,
        step["native"] - attention - linear - head,
        head,
        step["embedding"],
        step["schedule"],
        step["sample"],
        step["total"] - inside,
    )
    return {"total": step["total"] + sealing, **dict(zip(PARTS, values, strict=True))}


def measure(args: argparse.Namespace, weights: str) -> dict[tuple[str, str], list[dict[str, float]]]:
    """The parts of every repeat, by phase and dtype."""
    loaded, clocks = clocked(load_model(args.model, weights=weights, progress=note))
    linears = Linears(loaded)
    evict = Evict(args.evict_mib << 20)
    subjects = {dtype: Subject(loaded, dtype, clocks, args) for dtype in args.dtype}
    found: dict[tuple[str, str], list[dict[str, float]]] = {
        (phase, dtype): [] for phase in args.phase for dtype in args.dtype
    }
    for repeat in range(args.repeats):
        note(f"weights {weights}: repeat {repeat + 1}/{args.repeats}")
        few = median_of([linears.seconds(args.batch) for _ in range(3)])
        heads = []
        for _ in range(3):
            evict()
            heads.append(linears.head(args.batch))
        many = linears.seconds(args.chunk) if "prefill" in args.phase else 0.0
        for dtype, subject in subjects.items():
            if "decode" in args.phase:
                found["decode", dtype].append(subject.decode(evict, few, median_of(heads)))
            if "prefill" in args.phase:
                found["prefill", dtype].append(subject.chunk(evict, many))
    return found


def rows_of(found: dict[tuple[str, str], list[dict[str, float]]], weights: str) -> list[Row]:
    rows: list[Row] = []
    for (phase, dtype), repeats in found.items():
        total = median_of([parts["total"] for parts in repeats])
        for part in ("total", *PARTS):
            row: Row = {"phase": phase, "weights": weights, "dtype": dtype, "part": part}
            row |= spread("ms", [parts[part] for parts in repeats], 1e3)
            rows.append(row | {"share_of_step": row["ms"] / 1e3 / total})
    return rows


def picture(rows: Sequence[Row], args: argparse.Namespace) -> Figure:
    """A stacked bar for each step; whiskers are the whole step's least and greatest."""
    figure = Figure(figsize=(9.6, 1.6 + 0.42 * len(args.weights) * len(args.dtype) * len(args.phase)))
    figure.set_layout_engine("constrained")
    titles = {
        "decode": f"decode, {args.batch} x {args.context:,}",
        "prefill": f"{args.chunk} tokens at {args.prompt:,}",
    }
    panels = figure.subplots(len(args.phase), 1, squeeze=False)
    for (axes,), phase in zip(panels, args.phase, strict=True):
        names = [(weights, dtype) for weights in args.weights for dtype in args.dtype]
        for place, (weights, dtype) in enumerate(names):
            own = {r["part"]: r for r in rows if (r["phase"], r["weights"], r["dtype"]) == (phase, weights, dtype)}
            left = 0.0
            for index, part in enumerate(PARTS):
                width = max(0.0, own[part]["ms"])
                colour = (*COLOURS, "#bbbbbb")[index]
                axes.barh(place, width, left=left, color=colour, label=part if place == 0 else None)
                left += width
            total = own["total"]
            noise = [[total["ms"] - total["ms_min"]], [total["ms_max"] - total["ms"]]]
            axes.errorbar([total["ms"]], [place], xerr=noise, fmt="k|", ms=9, capsize=3, lw=0.9)
        labels = [f"{dtype}, weights {weights}" for weights, dtype in names]
        axes.set_yticks(range(len(names)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(titles[phase], fontsize=9)
        axes.set_xlabel("ms", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=5, loc="outside lower center")
    return figure


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--weights", nargs="+", default=["bf16"], choices=WEIGHT_FORMATS)
    parser.add_argument("--phase", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=7680, help="tokens of each decoding sequence")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens before the chunk, whole pages")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the chunk, whole pages")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a repeat")
    parser.add_argument("--evict-mib", type=int, default=128, help="read before each part; more than the caches hold")
    args = parser.parse_args()
    if args.chunk % 64 or args.prompt % 64 or not args.chunk:
        parser.error("--prompt and --chunk are whole pages of 64 tokens")
    rows: list[Row] = []
    for weights in args.weights:
        rows += rows_of(measure(args, weights), weights)
    notes = "Medians of the repeats, least and greatest. How each part is obtained: benchmarks/step_breakdown.py."
    publish(
        "What a step is made of", {"rows": rows}, facts_of(args), args.json, picture(rows, args), notes, args.picture
    )


if __name__ == "__main__":
    main()
