"""Attention on a GPU, on synthetic pages: device time by Triton's ``do_bench``, bytes per second, speed over the
first dtype.

    python benchmarks/triton_attention.py --json out/triton_attention.json [--dtype int4 ...] [--context 8192 ...]

Decode: every sequence has one new token. Prefill: the last 512 tokens of a prompt. One layer of Llama-3.1-8B's shape,
on as many bytes as its sequences need.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from report import write
from triton.testing import do_bench

from kvbits.codecs import PoolLayout, parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.kernels import Backend, BatchLayout, SequencePages, choose_backend
from kvbits.pool import PagedPool

LAYER = LayerGeometry(32, 8, 128, 128, 128**-0.5)
PREFILL_TOKENS = 512


class Case:
    """A pool of zeros (every code and scale is 0, which takes as long as any other) and a step's rows."""

    def __init__(self, dtype: str, batch: int, context: int, new: int, device: str, backend: Backend) -> None:
        geometry = ModelGeometry("bench", (LAYER, LAYER), context + 1, 16)
        policy = parse_policy(dtype, 2)
        layout = PoolLayout.of(geometry, policy)
        start, full = context - new, context // PAGE_TOKENS
        self.pool = PagedPool(geometry, policy, batch * layout.session_bytes(context), device=device)
        frames = self.pool.num_frames
        self.pool.buffer.zero_()
        order = torch.randperm(frames, generator=torch.Generator().manual_seed(0)).tolist()
        slices = []
        for _ in range(batch):
            sealed, own = [order.pop() for _ in range(full)], [order.pop() for _ in range(layout.open.frames)]
            slices.append(SequencePages(start, new, sealed, own, own))
        self.batch, self.backend = BatchLayout.of(slices), backend
        self.query, self.key, self.value = (
            torch.randn(batch * new, heads, 128, dtype=torch.bfloat16, device=device)
            for heads in (LAYER.num_heads, LAYER.num_kv_heads, LAYER.num_kv_heads)
        )
        self.bytes = batch * (start // PAGE_TOKENS) * layout.sealed.places[1].scheme.layer_bytes(LAYER)

    def step(self) -> torch.Tensor:
        """Seal, attend and append in one layer."""
        return self.backend.forward(self.pool.layers[1], self.batch, self.query, self.key, self.value, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4", "nf4", "int2"])
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if not torch.get_device_module(args.device).is_available():
        sys.exit(f"there is no device '{args.device}' here; these kernels are only timed on a GPU")
    backend = choose_backend("triton", args.device)
    results = []
    print(f"{'phase':8} {'context':>7} {'batch':>5} {'dtype':8} {'us':>9} {'GB/s':>7} {'speed':>6}")
    for phase, new in (("decode", 1), ("prefill", PREFILL_TOKENS)):
        for context in args.context:
            for batch in args.batch if phase == "decode" else [1]:
                base = None
                for dtype in args.dtype:
                    case = Case(dtype, batch, context, new, args.device, backend)
                    seconds = do_bench(case.step, return_mode="median") / 1e3
                    base = base or seconds
                    rate = case.bytes / seconds / 1e9
                    figures = f"{seconds * 1e6:9.1f} {rate:7.1f} {base / seconds:6.2f}"
                    print(f"{phase:8} {context:7} {batch:5} {dtype:8} {figures}", flush=True)
                    results.append(
                        {"phase": phase, "context": context, "batch": batch, "dtype": dtype, "seconds": seconds,
                         "bytes_per_second": rate * 1e9}
                    )  # fmt: skip
    if args.json:
        write(args.json, {"device": torch.get_device_module(args.device).get_device_name(), "results": results})


if __name__ == "__main__":
    main()
