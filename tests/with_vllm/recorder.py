"""What a vLLM worker is given to tests (``worker_extension_cls``): it records every layer's rows, and replays them.

A replay runs the rows of one request, in one piece, through a pool of kvbits' own: no blocks of vLLM's, no chunks, no
cache hits, no other requests. Its result must be the recorded one to the last bit, since in kvbits it depends on a
token's position alone.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """Mixed into vLLM's worker; methods are called by ``LLM.collective_rpc``."""

    model_runner: Any
    expected: Any = None

    def record(self, layers: list[int] | None = None, triton: bool = False) -> None:
        """Keep queries, keys, values and results of ``layers`` (default: all), by request and position; the last.

        ``triton``: from now on a GPU's kernels run, in the interpreter.
        """
        from kvbits.vllm.backend import KvbitsImpl

        self.rows: Any = defaultdict(dict)  # (request, layer) -> position -> rows
        self.impls: dict[int, Any] = {}
        self.steps: list[Any] = []
        run = KvbitsImpl.forward
        if triton:
            from kvbits.kernels.reference import ReferenceBackend
            from kvbits.kernels.triton.backend import TritonBackend

            context = self.model_runner.compilation_config.static_forward_context
            (shared,) = {x.impl.shared for x in context.values() if isinstance(getattr(x, "impl", None), KvbitsImpl)}
            shared._backend = TritonBackend("cpu")
            self.expected = ReferenceBackend()

        def forward(impl: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, memory: Tensor, step: Any,
                    output: Tensor, **others: Any) -> Tensor:  # fmt: skip
            found = run(impl, layer, query, key, value, memory, step, output, **others)
            if step is not None and (layers is None or impl.index in layers):
                self.impls[impl.index] = impl
                self._keep(impl.index, step, query, key, value, output)
            return found

        KvbitsImpl.forward = forward

    def _keep(self, layer: int, step: Any, *tensors: Tensor) -> None:
        ids = [name.rpartition("-")[0] for name in self.model_runner.input_batch.req_ids]  # without vLLM's own suffix
        for at, request in enumerate(step.requests):
            for i in range(step.counts[at]):
                position, row = int(step.starts[at] + i), int(step.rows[at] + i)
                self.rows[ids[request], layer][position] = [t[row].clone() for t in tensors]
            if layer == min(self.impls):
                self.steps.append((ids[request], int(step.starts[at]), int(step.counts[at])))

    def replay(self, lengths: dict[str, int], prefixes: dict[str, str]) -> dict[str, Any]:
        """Compare every request in ``lengths``, of so many tokens, with its replay.

        ``prefixes`` names the request that computed the beginning of another, which found it in the cache. Returns the
        number of rows, how many of them differ, and the greatest difference.
        """
        rows = differing = 0
        most = 0.0
        for (request, layer), found in self.rows.items():
            if request not in lengths:
                continue
            whole = {**self.rows.get((prefixes.get(request), layer), {}), **found}
            query, key, value, _ = (
                torch.stack(t) for t in zip(*(whole[i] for i in range(lengths[request])), strict=True)
            )
            expected = alone(self.impls[layer], query, key, value, self.expected)
            for position, (_, _, _, output) in found.items():
                if position < lengths[request]:
                    rows += 1
                    error = (output.view_as(expected[position]).float() - expected[position].float()).abs().max().item()
                    differing += error != 0
                    most = max(most, error)
        return {"rows": rows, "differing": differing, "most": most, "requests": len(lengths), "steps": self.steps}


def alone(impl: Any, query: Tensor, key: Tensor, value: Tensor, backend: Any) -> Tensor:
    """One sequence in a pool of kvbits' for one layer, all rows in one step of ``backend`` (default: the CPU's)."""
    from kvbits.codecs import Policy
    from kvbits.config import PAGE_TOKENS, ModelGeometry
    from kvbits.kernels import BatchLayout, SequencePages
    from kvbits.kernels.cpu import CpuBackend
    from kvbits.pool import PagedPool

    whole = impl.shared.policy
    rounding = whole.rounding and (whole.rounding[impl.index],)
    policy = Policy(whole.name, (whole.layers[impl.index],), rounding=rounding)
    geometry = ModelGeometry("one layer", (impl.geometry,), len(query), 1)
    full = len(query) // PAGE_TOKENS
    frame = PagedPool.smallest(geometry, policy).layout
    pool = PagedPool(geometry, policy, frame.bytes_of(full + frame.open.frames + 1), free_windows=False)
    own = list(range(full, full + frame.open.frames))
    batch = BatchLayout.of([SequencePages(0, len(query), list(range(full)), own, own, [])])
    return (backend or CpuBackend()).forward(pool.layers[0], batch, query, key, value, impl.sinks)
