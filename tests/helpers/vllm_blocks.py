"""A cache as vLLM lays it out for a model, and its blocks in vLLM's offload, moved where vLLM's worker would copy them.

vLLM's own code plans the cache, makes its tensors, registers them for offload and says from where to where a block is
copied. Only the copy itself, a GPU's, is done here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, KVCacheLayout, SlidingWindowSpec
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.gpu_worker import SingleDirectionOffloadingHandler
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.worker.utils import allocate_kv_cache

try:  # 0.33
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

HEADS, DIM = 4, 32
GROUPS = (
    ("model.layers.1.attn", "model.layers.3.attn", "model.layers.5.attn"),
    ("model.layers.2.attn", "model.layers.4.attn"),
)


@dataclass
class Model:
    """Sizes of the offload: tokens of a block, blocks of a chunk, tensor-parallel workers."""

    layout: str
    tokens: int
    blocks: int
    workers: int = 1
    dtype: torch.dtype = torch.bfloat16

    def config(self, extra: dict[str, Any], engine: str = "kvbits-test", **changes: Any) -> OffloadingConfig:
        """As vLLM's connector makes it."""
        given = {
            "groups": tuple(OffloadingGroupConfig(self.tokens, names, i) for i, names in enumerate(GROUPS)),
            "worker_kv_bytes_per_block": 4 * len(GROUPS[0]) * self.tokens * HEADS // self.workers * DIM,
            "enable_kv_cache_events": False, "extra_config": extra, "engine_id": engine,
            "model": OffloadingModelConfig("some/model", str(self.dtype).removeprefix("torch.")),
            "cache": OffloadingCacheConfig(tokens_per_hash=self.tokens, blocks_per_chunk=self.blocks),
            "parallel": OffloadingParallelConfig(
                rank=0, world_size=self.workers, tp_size=self.workers, pp_size=1, pcp_size=1, dcp_size=1,
                data_parallel_index=0, data_parallel_size=1, data_parallel_rank_local=None,
                is_parallelism_agnostic=False,
            ),
            "kv_cache_layout": self.layout,
        }  # fmt: skip
        return OffloadingConfig(**{**given, **changes})


class Worker:
    """One tensor-parallel worker: its cache of random rows, ``caches[layer]`` ``[blocks, heads, tokens, 2 * dim]``."""

    def __init__(self, model: Model, rank: int, spec: Any) -> None:
        heads, size = HEADS // model.workers, {"num_kv_heads": HEADS // model.workers, "head_size": DIM}
        specs = (
            FullAttentionSpec(block_size=model.tokens, dtype=model.dtype, **size),
            SlidingWindowSpec(block_size=model.tokens, dtype=model.dtype, sliding_window=100, **size),
        )
        groups = [KVCacheGroupSpec(list(names), one) for names, one in zip(GROUPS, specs, strict=True)]
        layout = KVCacheLayout[model.layout]
        config = SimpleNamespace(
            attention_config=SimpleNamespace(hisparse_config=None),
            cache_config=SimpleNamespace(
                get_resolved_kv_cache_layout=lambda: layout, num_gpu_blocks_override=None,
                prefix_cache_retention_interval=None,
            ),
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: HEADS),
            parallel_config=SimpleNamespace(
                tensor_parallel_size=model.workers, prefill_context_parallel_size=1, decode_context_parallel_size=1,
                cp_kv_cache_interleave_size=1, world_size=model.workers, rank=rank,
            ),
        )  # fmt: skip
        memory = 24 * 4 * len(GROUPS[0]) * model.tokens * heads * DIM
        plan = get_kv_cache_config_from_groups(config, groups, memory)
        found = allocate_kv_cache(plan, torch.device("cpu"), layout)
        self.caches = {name: cache.view(model.dtype) for name, cache in found.items()}
        generator = torch.Generator().manual_seed(rank)
        for cache in self.caches.values():
            cache.copy_(torch.randn(cache.shape, generator=generator))
        canonical: list[Any] = []
        registrar = SimpleNamespace(get_worker=canonical.append, replicated_layout=False)
        OffloadingConnectorWorker(registrar, config, plan).register_kv_caches(found)
        (self._canonical,) = canonical
        self._region = SharedOffloadRegion(
            spec.config.engine_id, spec.num_chunks, rank, spec.kv_bytes_per_chunk, spec.cpu_page_size_per_worker
        )
        self._host = [self._region.create_next_worker_view(t.page_size_bytes * model.blocks)
                      for t in self._canonical.tensors]  # fmt: skip
        self._blocks = model.blocks

    def move(self, chunk: int, group: int, blocks: list[int], out: bool) -> None:
        """Copy the cache's ``blocks`` of ``group`` to host memory's ``chunk`` (``out``) or back."""
        handler = object.__new__(SingleDirectionOffloadingHandler)
        handler.layer_refs_per_group = self._canonical.group_data_refs
        ours = [tensor.tensor for tensor in self._canonical.tensors]
        handler.src_tensors, handler.dst_tensors = (ours, self._host) if out else (self._host, ours)
        handler.src_blocks_per_chunk, handler.dst_blocks_per_chunk = (1, self._blocks)[:: 1 if out else -1]
        count = len(blocks) * len(handler.layer_refs_per_group[group])
        source, target, sizes = (np.zeros(count, np.uint64) for _ in range(3))
        ends = np.array(blocks), np.array([chunk])
        handler._fill_direct_ops(group, *(ends if out else ends[::-1]), len(blocks), 0, 0, source, target, sizes, 0)
        for a, b, n in zip(source.tolist(), target.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(b, a, n)

    def close(self) -> None:
        self._host.clear()
        self._region.cleanup()
