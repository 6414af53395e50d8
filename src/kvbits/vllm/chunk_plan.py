"""What vLLM's offload moves, checked against a policy: whose layers, which sizes. No vLLM.

A chunk belongs to one of vLLM's groups of layers; groups share memory, so that every row has the same size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbits.codecs import SCHEMES, Policy, policy_of
from kvbits.config import PAGE_TOKENS, POLICY_PREFIX, LayerGeometry, ModelGeometry
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels.chunks import ChunkCoder
from kvbits.vllm.rows import LAYOUTS, RowLayout


@dataclass(frozen=True)
class ChunkPlan:
    """How chunks of ``model`` become bytes: ``coders`` by vLLM's number of the group, ``dtype`` of the cache."""

    model: str
    rows: RowLayout
    coders: dict[int, ChunkCoder]
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, policy: str, kv_heads: int, head_size: int) -> ChunkPlan:
        """From vLLM's ``OffloadingConfig``. Raises ``ConfigError`` or ``UnsupportedError`` for what cannot work."""
        for name, value in (("kv_heads", kv_heads), ("head_size", head_size)):
            positive(name, value)
        if not isinstance(policy, str):
            raise ConfigError(f"'policy' of kvbits' tier is {policy!r}; choose from {', '.join(SCHEMES)}")
        for reason in _refusals(config, kv_heads):
            raise UnsupportedError(f"kvbits' tier: {reason}")
        workers = config.parallel.tp_size
        rows = RowLayout(
            layout=config.kv_cache_layout,
            workers=workers,
            layers=max(len(group.layer_names) for group in config.groups),
            blocks=config.cache.blocks_per_chunk,
            tokens=config.groups[0].tokens_per_block,
            heads=kv_heads // workers,
            head_size=head_size,
        )
        given = config.worker_kv_bytes_per_block * rows.blocks
        if rows.part_bytes != given:
            raise ConfigError(
                f"vLLM moves chunks of {given} bytes; {rows.layers} layers of {kv_heads} heads of {head_size} would be "
                f"{rows.part_bytes}: name the model's 'kv_heads' and 'head_size'. Layers that differ are not served"
            )
        whole = _policy(policy, config, kv_heads, head_size)
        coders = {
            group.group_id: ChunkCoder(_part(whole, layers), kv_heads, head_size)
            for group, layers in zip(config.groups, _layers(config), strict=True)
        }
        return cls(config.model.name, rows, coders, getattr(torch, config.model.dtype))

    @property
    def tokens(self) -> int:
        """Of a chunk."""
        return self.rows.blocks * self.rows.tokens

    @property
    def chunk_bytes(self) -> int:
        """Of the largest chunk, coded."""
        return max(coder.size(self.tokens) for coder in self.coders.values())

    @property
    def directory(self) -> str:
        """A name for chunks of this kind alone: of the model, of what their headers say."""
        headers = b"".join(c.format(self.model, self.tokens, self.dtype).header() for c in self.coders.values())
        return f"{self.model.strip('/').replace('/', '_')}-{hashlib.sha256(headers).hexdigest()[:12]}"

    def encode(self, row: Tensor, group: int) -> Tensor:
        """``uint8 [bytes]`` of the chunk of ``group`` in ``row`` ``uint8 [bytes]``."""
        coder = self.coders[group]
        data = torch.empty(coder.size(self.tokens), dtype=torch.uint8)
        coder.encode(self._shares(row, coder), self.model, data)
        return data

    def decode(self, data: Tensor, row: Tensor, group: int) -> None:
        """Undo :meth:`encode` into ``row``. Raises ``CacheError`` for bytes of anything else."""
        coder = self.coders[group]
        coder.decode(data, self.model, self._shares(row, coder))

    def _shares(self, row: Tensor, coder: ChunkCoder) -> list[Tensor]:
        return self.rows.shares(row, len(coder.policy.layers), self.dtype)


def positive(name: str, value: object) -> None:
    """Raise ``ConfigError`` unless the option ``name`` is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"'{name}' of kvbits' tier is {value!r}; it must be a positive whole number")


def _refusals(config: Any, kv_heads: int) -> Iterator[str]:
    parallel, cache = config.parallel, config.cache
    sizes = {group.tokens_per_block for group in config.groups}
    tokens = config.groups[0].tokens_per_block
    if config.model.dtype not in ("bfloat16", "float16"):
        yield f"the cache is {config.model.dtype}; blocks in bfloat16 or float16 are taken (--kv-cache-dtype auto)"
    if config.kv_cache_layout not in LAYOUTS:
        yield f"the cache's layout is {config.kv_cache_layout}; set VLLM_KV_CACHE_LAYOUT to one of {', '.join(LAYOUTS)}"
    if config.canonical_layout or config.replicated_layout:
        yield "canonical or replicated chunks (canonical_layout, MLA) lie otherwise"
    for name in ("pp_size", "pcp_size", "dcp_size"):
        if getattr(parallel, name) > 1:
            yield f"{name} {getattr(parallel, name)}: workers have the same layers and tokens here"
    if kv_heads % parallel.tp_size or parallel.world_size != parallel.tp_size:
        yield f"{kv_heads} KV heads on {parallel.world_size} workers; every worker has its own here"
    if len(sizes) > 1:
        yield f"groups of layers have blocks of {sorted(sizes)} tokens; they must be alike"
    if config.kv_cache_layout == "LBHNC" and tokens > PAGE_TOKENS:
        yield f"blocks of {tokens} tokens may be split by kernels in this layout; set --block-size {PAGE_TOKENS}"
    if tokens * cache.blocks_per_chunk % PAGE_TOKENS:
        needed = PAGE_TOKENS // math.gcd(tokens, PAGE_TOKENS)
        yield (
            f"a chunk of {tokens * cache.blocks_per_chunk} tokens is no whole page of {PAGE_TOKENS}; set "
            f"blocks_per_chunk to {needed} in kv_connector_extra_config, or a multiple"
        )


def _policy(text: str, config: Any, kv_heads: int, head_size: int) -> Policy:
    layer = LayerGeometry(kv_heads, kv_heads, head_size, head_size, 1.0)
    name = config.model.name
    count = sum(len(group.layer_names) for group in config.groups)
    fingerprint = None
    if text.startswith(POLICY_PREFIX):
        from kvbits.models.fingerprint import fingerprint_of

        fingerprint = fingerprint_of(name)
    return policy_of(text, ModelGeometry(name, (layer,) * count, 1, 1), fingerprint)


def _layers(config: Any) -> list[list[int]]:
    """Of every group: which of the model's layers, counted without those that have no cache."""
    numbers = [[_number(name) for name in group.layer_names] for group in config.groups]
    order = sorted(number for group in numbers for number in group)
    return [[order.index(number) for number in group] for group in numbers]


def _number(name: str) -> int:
    found = [int(part) for part in name.split(".") if part.isdigit()]
    if len(found) != 1:
        raise UnsupportedError(f"kvbits' tier: the layer '{name}' has no number of its own")
    return found[0]


def _part(policy: Policy, layers: list[int]) -> Policy:
    rounding = None if policy.rounding is None else tuple(policy.rounding[i] for i in layers)
    return Policy(policy.name, tuple(policy.layers[i] for i in layers), policy.sink, rounding, policy.label)
