"""Host time of a decode step on a GPU, without a GPU: the launches do nothing.

    python benchmarks/step_host.py [--layers 32] [--batch 16] [--context 8192] [--dtype int4] [--json FILE]

CPU time of one thread, the least of many steps, where no sequence fills its page and where one does. ``tables``:
preparing a step; ``attention``: all layers' attention and storing, with the outputs' and partial results' allocations;
``replayed``: what is left where the step is a graph that was recorded, new tables and new tokens; where a page fills, a
sequence has other pages than in the step before. Triton's and the driver's own time of a launch is not in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from report import write

from kvbits.codecs import PoolLayout, parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.kernels import Backend, BatchLayout, SequencePages
from kvbits.kernels.cuda.backend import CudaBackend
from kvbits.kernels.cuda.variant import Variant
from kvbits.kernels.static import refill, static_layout
from kvbits.kernels.triton.backend import TritonBackend
from kvbits.pool import PagedPool

LAYER = LayerGeometry(32, 8, 128, 128, 128**-0.5)


class Nothing:
    """Launches that do nothing, of both kinds of kernels."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return

    def prepare(self, variant: Variant) -> None:
        return


class CudaWithout(CudaBackend):
    """The backend 'cuda' whose Triton launches do nothing either."""

    def __init__(self) -> None:
        super().__init__("cuda", False, Nothing(), 132)
        self._launch = Nothing()


def batch_of(batch: int, context: int, frames: int, fills: bool, before: bool = False) -> BatchLayout:
    """Sequences of ``context`` tokens and up to a page more; ``fills``: one of them fills its page, which may be the
    one ``before``."""
    starts = [context + 4 * i % (PAGE_TOKENS - 1) for i in range(batch)]
    if fills:
        starts[-1] = context + PAGE_TOKENS * (not before) - 1
    own = list(range(frames))
    return BatchLayout.of([SequencePages(s, 1, range((s + 1) // PAGE_TOKENS), own, own) for s in starts])


def least(call: Callable[[], object], times: int = 30) -> float:
    """Seconds of CPU time."""
    found = []
    for _ in range(times):
        begin = time.thread_time()
        call()
        found.append(time.thread_time() - begin)
    return min(found)


def measure(backend: Backend, dtype: str, layers: int, batch: int, context: int, fills: bool) -> dict[str, float]:
    """Seconds of the parts of a step."""
    geometry = ModelGeometry("bench", (LAYER,) * layers, context + 2 * PAGE_TOKENS, 16)
    policy = parse_policy(dtype, layers)
    layout = PoolLayout.of(geometry, policy)
    pool = PagedPool(geometry, policy, 4 * layout.session_bytes(PAGE_TOKENS))  # no byte of it is touched
    query, key, value = (
        torch.zeros(batch, heads, 128, dtype=torch.bfloat16) for heads in (LAYER.num_heads, *[LAYER.num_kv_heads] * 2)
    )
    ready = batch_of(batch, context, layout.open.frames, fills)

    def attend(views: int, step: BatchLayout) -> None:
        for view in pool.layers[:views]:
            backend.forward(view, step, query, key, value, None)

    def first() -> None:
        ready.shared.clear()
        attend(1, ready)

    attend(layers, ready)
    pages = 1 << (ready.sealed.shape[1] - 1).bit_length()
    static = static_layout(batch, pages, layout.open.frames, 0, completes=fills)
    attend(layers, static)
    ids, positions = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)

    steps = cycle((ready, batch_of(batch, context, layout.open.frames, fills, before=fills)))

    def replay() -> None:
        refill(static, next(steps))
        ids.copy_(positions)
        positions.copy_(ids)

    one = least(lambda: attend(1, ready))
    return {
        "tables": least(first) - one,
        "attention": least(lambda: attend(layers, ready)),
        "replayed": least(replay),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--dtype", default="int4")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    print("kernels a page is full  tables us  attention us  replayed us")
    for backend in (CudaWithout(), TritonBackend("cuda", Nothing())):
        for fills in (False, True):
            found = measure(backend, args.dtype, args.layers, args.batch, args.context, fills)
            results.append({"kernels": backend.name, "fills": fills, **found})
            tables, attention, replayed = (1e6 * seconds for seconds in found.values())
            print(f"{backend.name:8}{fills!s:14}{tables:10.0f}{attention:14.0f}{replayed:13.0f}")
    if args.json:
        write(args.json, {"results": results})


if __name__ == "__main__":
    main()
