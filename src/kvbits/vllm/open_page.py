"""The 16-bit page that a request fills: a block of the same pool, held for the request's whole life.

vLLM has a kind of cache for it: a ring of one block a request, outside the prefix cache, counted when a request is
admitted (``CircularBufferSpec``). A small layer beside each of the model's layers asks for one; vLLM packs as many of
them into a block as fit. Where drafts can be undone over a page's end there are two, for pages of even and of odd
number, so that the page before the newest keeps its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheSpec

from kvbits.config import PAGE_TOKENS, LayerGeometry, pages_of
from kvbits.vllm.blocks import PageBackend


@dataclass(frozen=True, kw_only=True)
class OpenPageSpec(CircularBufferSpec):
    """``parity``: of the numbers of the pages that lie here; layers of one parity lie alike in their blocks."""

    parity: int = 0

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """One, but the first model runner looks every token's slot up, for every group of layers."""
        return pages_of(max_len)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(isinstance(s, OpenPageSpec) and s.parity == self.parity for s in kv_cache_specs.values())


@dataclass(frozen=True)
class OpenTable:
    """Of a group of open pages in a step: the block of every request, ``int32 [requests]``, on the CPU."""

    group: tuple[str, ...]
    table: Tensor


class OpenTableBuilder(AttentionMetadataBuilder[Any]):
    """Hands the block table on to the layers that open pages belong to."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> OpenTable:
        return OpenTable(tuple(self.layer_names), common_attn_metadata.block_table_tensor[:, 0].cpu())


class OpenPageBackend(PageBackend):
    """What vLLM asks of the kind of layer that an :class:`OpenPage` is; nothing attends through it."""

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError

    @staticmethod
    def get_builder_cls() -> type[OpenTableBuilder]:
        return OpenTableBuilder


class OpenPage(nn.Module, AttentionLayerBase):
    """Memory for one layer's 16-bit pages of one parity."""

    def __init__(self, name: str, geometry: LayerGeometry, parity: int) -> None:
        super().__init__()
        self.name, self.geometry, self.parity = name, geometry, parity
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[PageBackend]:
        return OpenPageBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        return OpenPageSpec(
            block_size=PAGE_TOKENS,
            num_kv_heads=self.geometry.num_kv_heads,
            head_size=self.geometry.key_dim,
            head_size_v=self.geometry.value_dim,
            dtype=torch.bfloat16,
            parity=self.parity,
        )
