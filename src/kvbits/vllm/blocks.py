"""What every kind of block that kvbits has in vLLM is: 64 tokens, laid out as a frame of kvbits' pool."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheLayout

from kvbits.config import PAGE_TOKENS


class PageBackend(AttentionBackend):
    """The part of a backend that tells vLLM the shape of its blocks."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"  # a layer looks it up in a closed list

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [PAGE_TOKENS]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size in (None, PAGE_TOKENS)  # a larger one cannot be split: its pages are whole

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC,)  # a block as kvbits' frame: layer after layer, in a layer head after head
