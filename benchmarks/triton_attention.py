"""Attention on a GPU: device time of a layer, bytes per second, speed over the first dtype.

    python benchmarks/triton_attention.py --json out/triton_attention.json [--dtype int4 ...] [--backend triton ...]

Decode: every sequence has one new token. A step that fills no page and one that seals a page of every sequence are
timed apart; ``us`` is the mean of 63 of the former and one of the latter, ``seal us`` the latter. Prefill: the last
``--prefill`` tokens of a prompt. Layers of Llama-3.1-8B's shape, on pages that the reference made of normal numbers,
as many as make a gigabyte and at most 16: times are a layer's share. On CUDA devices a step is replayed as a graph, so
that no host time counts (``eager`` elsewhere); the caches are emptied before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from report import write
from torch import Tensor
from triton.testing import do_bench

from kvbits.codecs import SCHEMES, Place, PoolLayout, Scheme, parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.kernels import Backend, BatchLayout, SequencePages, choose_backend
from kvbits.pool import LayerView, PagedPool

LAYER = LayerGeometry(32, 8, 128, 128, 128**-0.5)
PAGES = 16
"""Pages that are made; frames hold them in turn."""


@cache
def pages_of(scheme: Scheme) -> Tensor:
    """Bytes ``[PAGES, bytes of a page]`` of normal numbers, keys with an offset for each channel."""
    g = torch.Generator().manual_seed(0)
    offset = torch.randn(LAYER.num_kv_heads, 1, LAYER.key_dim, generator=g)
    keys = torch.randn(PAGES, LAYER.num_kv_heads, PAGE_TOKENS, LAYER.key_dim, generator=g) + offset
    values = torch.randn(PAGES, LAYER.num_kv_heads, PAGE_TOKENS, LAYER.value_dim, generator=g)
    parts = [scheme.key.encode(keys, "key"), scheme.value.encode(values, "value")]
    return torch.cat(parts, dim=-1).flatten(1)


def fill(view: LayerView, place: Place, frames: list[int]) -> None:
    """Put pages into ``frames``."""
    pages = pages_of(place.scheme).to(view.buffer.device)
    for i in range(PAGES):
        at = torch.tensor(frames[i::PAGES], dtype=torch.int64, device=view.buffer.device)
        view.buffer[at, place.offset : place.offset + pages.shape[1]] = pages[i]


class Case:
    """A pool of real pages and a step's rows: each of ``batch`` sequences has ``new`` tokens from ``start`` on."""

    def __init__(self, dtype: str, batch: int, start: int, new: int, device: str, backend: Backend) -> None:
        size = batch * (start // PAGE_TOKENS + 1) * SCHEMES[dtype].layer_bytes(LAYER)
        layers = max(min(16, (1 << 30) // size), 1)
        geometry = ModelGeometry("bench", (LAYER,) * layers, start + new + 1, 16)
        policy = parse_policy(dtype, layers)
        layout = PoolLayout.of(geometry, policy)
        self.pool = PagedPool(geometry, policy, batch * layout.session_bytes(start + new), device=device)
        self.pool.buffer.zero_()
        order = torch.randperm(self.pool.num_frames, generator=torch.Generator().manual_seed(0)).tolist()
        slices = []
        for _ in range(batch):
            sealed = [order.pop() for _ in range((start + new) // PAGE_TOKENS)]
            own = [order.pop() for _ in range(layout.open.frames)]
            slices.append(SequencePages(start, new, sealed, own, own))
        for view in self.pool.layers:
            fill(view, view.sealed, [frame for s in slices for frame in s.sealed])
            fill(view, view.open, [s.head[view.open.frame] for s in slices])
        self.batch, self.backend = BatchLayout.of(slices), backend
        self.query, self.key, self.value = (
            torch.randn(batch * new, heads, 128, dtype=torch.bfloat16, device=device)
            for heads in (LAYER.num_heads, LAYER.num_kv_heads, LAYER.num_kv_heads)
        )
        self.bytes = batch * (start // PAGE_TOKENS) * self.pool.layers[0].sealed.scheme.layer_bytes(LAYER)

    def step(self) -> None:
        """Seal what is full, attend and append, layer by layer."""
        for view in self.pool.layers:
            self.backend.forward(view, self.batch, self.query, self.key, self.value, None)

    def seconds(self) -> float:
        """The median of a step, a layer's share."""
        return float(do_bench(self._replay(), return_mode="median")) / 1e3 / len(self.pool.layers)

    def _replay(self) -> Callable[[], object]:
        if self.query.device.type != "cuda":
            return self.step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and puts the step's tables on the device
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay


def measure(
    dtype: str, phase: str, batch: int, context: int, new: int, device: str, backend: Backend
) -> dict[str, float]:
    """Seconds of a layer's step; decode: of one that seals, bytes of sealed pages; prefill: floating-point operations
    of ``new`` tokens."""
    if phase == "prefill":
        flops = 4 * new * (context - new / 2) * LAYER.num_heads * LAYER.key_dim
        return {"seconds": Case(dtype, 1, context - new, new, device, backend).seconds(), "flops": flops}
    seal = Case(dtype, batch, context - 1, 1, device, backend).seconds()
    case = Case(dtype, batch, context - PAGE_TOKENS // 2, 1, device, backend)
    return {"seconds": (63 * case.seconds() + seal) / 64, "seal_seconds": seal, "bytes": case.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "int8", "int4", "nf4", "int2"])
    parser.add_argument("--context", type=int, nargs="+", default=[8192, 32768], help="multiples of 64")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512], help="tokens at the end of the context")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", nargs="+", default=["auto", "triton"], help="kernels; auto: the fastest that run")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if not torch.get_device_module(args.device).is_available():
        sys.exit(f"there is no device '{args.device}' here; these kernels are only timed on a GPU")
    results = []
    print("kernels phase    context batch   new dtype           us   seal us    GB/s TFLOP/s  speed")
    for name in args.backend:
        backend = choose_backend(name, args.device)
        plan = [("decode", context, batch, 1) for context in args.context for batch in args.batch]
        plan += [("prefill", context, 1, new) for context in args.context for new in args.prefill if new <= context]
        for phase, context, batch, new in plan:
            base = None
            for dtype in args.dtype:
                found = measure(dtype, phase, batch, context, new, args.device, backend)
                seconds, seal = found["seconds"], found.get("seal_seconds", 0.0)
                base = base or seconds
                rates = f"{found.get('bytes', 0) / seconds / 1e9:7.0f} {found.get('flops', 0) / seconds / 1e12:7.1f}"
                figures = f"{seconds * 1e6:9.1f} {seal * 1e6:9.1f} {rates} {base / seconds:6.2f}"
                print(f"{backend.name:7} {phase:8} {context:7} {batch:5} {new:5} {dtype:8} {figures}", flush=True)
                what = {"kernels": backend.name, "phase": phase, "context": context, "batch": batch, "new": new}
                results.append(what | {"dtype": dtype} | found)
    if args.json:
        device = torch.get_device_module(args.device).get_device_name()
        timed = "graph" if args.device.startswith("cuda") else "eager"
        write(args.json, {"device": device, "timed": timed, "results": results})


if __name__ == "__main__":
    main()
