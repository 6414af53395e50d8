"""Attention alone, on synthetic pages: time, bytes per second, share of the read bandwidth, ratio to 16 bit.

    python benchmarks/attention.py --json out/attention.json [--geometry smollm2 ...] [--context 8192 ...]

Decode: every sequence has one new token; a step reads every cache byte once. Prefill: the last 512 tokens of a prompt
of the given length. Layers are repeated until the cache is far larger than the processor caches. dtypes alternate in
a repetition; the figures are medians. After each step the whole pool is read once, beside which a step stands too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from bandwidth import read_bandwidth
from report import Row, bars, facts_of, plain_parser, publish, table

from kvbits.codecs import PoolLayout, parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.kernels import BatchLayout, SequencePages
from kvbits.kernels.cpu import CpuBackend, available_isas
from kvbits.pool import PagedPool

GEOMETRIES = {
    "smollm2": LayerGeometry(9, 3, 64, 64, 64**-0.5),
    "llama3-8b": LayerGeometry(32, 8, 128, 128, 128**-0.5),
    "qwen3-8b": LayerGeometry(32, 8, 128, 128, 128**-0.5),
}
LAYERS = {"smollm2": 30, "llama3-8b": 32, "qwen3-8b": 36}
PREFILL_ROWS = 512


@dataclass
class Case:
    """One timed configuration: a pool filled with sealed pages, and the step's inputs."""

    pool: PagedPool
    backend: CpuBackend
    batch: BatchLayout
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def step(self) -> float:
        """Seconds of all layers, each on its own part of the pool."""
        start = time.perf_counter()
        for view in self.pool.layers:
            self.backend.forward(view, self.batch, *self.rows, None)
        return time.perf_counter() - start

    def read(self) -> float:
        """Bytes a second of reading the pool from end to end: this very memory, which may be faster than other."""
        words = self.pool.buffer.view(-1)
        words = words[: len(words) // 8 * 8].view(torch.int64)
        start = time.perf_counter()
        words.sum()
        return 8 * len(words) / (time.perf_counter() - start)

    def cache_bytes(self) -> int:
        """Bytes of the cache that one step reads: sealed pages, and the open page in 16 bit."""
        layout = self.pool.layout
        sealed = sum(int(start) // PAGE_TOKENS for start in self.batch.starts) * layout.sealed.used_bytes
        return sealed + len(self.batch.starts) * layout.open.used_bytes


def make_case(
    geometry: str,
    dtype: str,
    isa: str,
    contexts: Sequence[int],
    phase: str,
    most_bytes: int,
    threads: int | None = None,
) -> Case:
    """Fill a pool: one page is really sealed per layer and copied to all others, so parameters are sane numbers."""
    layer = GEOMETRIES[geometry]
    per_layer = sum(contexts) * 2 * layer.num_kv_heads * (layer.key_dim + layer.value_dim)
    layers = max(1, min(LAYERS[geometry], most_bytes // per_layer))
    model = ModelGeometry(geometry, (layer,) * layers, max(contexts) + PAGE_TOKENS, 1)
    policy = parse_policy(dtype, layers)
    ends = list(accumulate(context // PAGE_TOKENS for context in contexts))
    first_open, batch = ends[-1], len(contexts)
    layout = PoolLayout.of(model, policy)
    pool = PagedPool(model, policy, layout.bytes_of(first_open) + batch * layout.session_bytes(0))
    backend = CpuBackend(isa, threads)
    generator = torch.Generator().manual_seed(0)

    def rows(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes = (
            (layer.num_heads, layer.key_dim),
            (layer.num_kv_heads, layer.key_dim),
            (layer.num_kv_heads, layer.value_dim),
        )
        return tuple(torch.randn(n, *shape, generator=generator).to(torch.bfloat16) for shape in shapes)  # type: ignore[return-value]

    opens = [
        range(first_open + s * layout.open.frames, first_open + (s + 1) * layout.open.frames) for s in range(batch)
    ]
    fill = BatchLayout.of([SequencePages(0, PAGE_TOKENS, [0], opens[0], opens[0])])
    sample = rows(PAGE_TOKENS)
    for view in pool.layers:
        backend.forward(view, fill, *sample, None)
    pool.buffer[1:first_open] = pool.buffer[0]
    count = 1 if phase == "decode" else PREFILL_ROWS
    slices = []
    for s, (context, end) in enumerate(zip(contexts, ends, strict=True)):
        sealed = range(end - context // PAGE_TOKENS, end)
        start = context - count - (0 if phase == "prefill" else PAGE_TOKENS // 2)
        slices.append(SequencePages(start, count, sealed, opens[s], opens[s]))
    return Case(pool, backend, BatchLayout.of(slices), rows(batch * count))


def measure(
    args: argparse.Namespace, geometry: str, phase: str, batch: int, context: int, bandwidth: float
) -> list[Row]:
    cases = {
        (dtype, isa): make_case(geometry, dtype, isa, [context] * batch, phase, args.max_bytes)
        for dtype in args.dtype
        for isa in args.isa
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    reads: dict[tuple[str, str], list[float]] = {key: [] for key in cases}
    for repeat in range(args.repeats + 1):
        for key, case in cases.items():
            seconds = case.step()
            if repeat:  # the first touches memory and pages for the first time
                times[key].append(seconds)
                reads[key].append(case.read())
    rows: list[Row] = []
    for (dtype, isa), case in cases.items():
        seconds = statistics.median(times[dtype, isa])
        base = statistics.median(times["bf16", isa]) if ("bf16", isa) in times else float("nan")
        gb_per_s = case.cache_bytes() / seconds / 1e9
        layers = len(case.pool.layers)
        rows.append(
            {
                "geometry": geometry,
                "phase": phase,
                "batch": batch,
                "context": context,
                "dtype": dtype,
                "isa": isa,
                "layers": layers,
                "ms": 1e3 * seconds / layers * LAYERS[geometry],
                "ms_min": 1e3 * min(times[dtype, isa]) / layers * LAYERS[geometry],
                "ms_max": 1e3 * max(times[dtype, isa]) / layers * LAYERS[geometry],
                "gb_per_s": gb_per_s,
                "share_of_read_bandwidth": gb_per_s * 1e9 / bandwidth,
                "share_of_reading_the_pool": gb_per_s * 1e9 / statistics.median(reads[dtype, isa]),
                "speedup_over_bf16": base / seconds,
            }
        )
    return rows


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--geometry", nargs="+", default=["smollm2"], choices=GEOMETRIES)
    parser.add_argument("--phase", nargs="+", default=["decode"], choices=["decode", "prefill"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8])
    parser.add_argument("--context", nargs="+", type=int, default=[8192])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--isa", nargs="+", default=available_isas()[:1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--max-bytes", type=int, default=2 << 30, help="16-bit cache bytes over which layers are left out"
    )
    args = parser.parse_args()
    bandwidth = read_bandwidth()
    rows = []
    for geometry in args.geometry:
        for phase in args.phase:
            for batch in args.batch:
                for context in args.context:
                    measured = measure(args, geometry, phase, batch, context, bandwidth)
                    print(table(measured), flush=True)
                    rows += measured
    facts = facts_of(args) | {"read_gb_per_s": bandwidth / 1e9}
    label = ("geometry", "phase", "batch", "context", "dtype", "isa")
    figure = bars("Attention alone", rows, label, "share_of_read_bandwidth")
    publish("Attention alone", {"rows": rows}, facts, args.json, figure, picture=args.picture)


if __name__ == "__main__":
    main()
