"""What all layers of one worker share: the policy, the kernels, the open pages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor
from vllm.forward_context import get_forward_context

from kvbits.codecs import Policy
from kvbits.config import LayerGeometry
from kvbits.errors import UnsupportedError
from kvbits.kernels import choose_backend, kernels_line
from kvbits.kernels.cpu import CpuBackend
from kvbits.kernels.hugepages import collapse_to_huge_pages
from kvbits.vllm.open_page import OpenPage, OpenTable
from kvbits.vllm.options import policy_asked
from kvbits.vllm.policy import read_policy
from kvbits.vllm.step import Ints

if TYPE_CHECKING:
    from kvbits.kernels.triton.backend import TritonBackend

log = logging.getLogger(__name__)


class Shared:
    """Made by the first layer of a model, and known to the others."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._context: dict[str, Any] = config.compilation_config.static_forward_context
        self._geometry: list[LayerGeometry] = []
        self._policy: Policy | None = None
        self._backend: CpuBackend | TritonBackend | None = None
        self._groups: list[list[str]] | None = None
        self._frames: list[int] = []
        self.parities = 1 if config.speculative_config is None else 2

    def add(self, geometry: LayerGeometry) -> int:
        """A layer of the model, in order; returns its index."""
        index = len(self._geometry)
        self._geometry.append(geometry)
        for parity in range(self.parities):
            name = open_page_name(index, parity)
            self._context[name] = OpenPage(name, geometry, parity)
        return index

    def layers(self) -> Iterator[Any]:
        """Every layer that vLLM knows, open pages among them."""
        return iter(tuple(self._context.values()))

    def open_memory(self, index: int, parity: int) -> Tensor:
        """Of a layer's open pages, ``[blocks, kv_heads, 64, bytes]``."""
        memory: Tensor = self._context[open_page_name(index, parity)].kv_cache
        return memory

    @property
    def policy(self) -> Policy:
        """The engine's; read once all layers are there."""
        if self._policy is None:
            from vllm.platforms import current_platform

            cache = self._config.cache_config
            text = policy_asked(cache.cache_dtype, self._config.additional_config, current_platform.kvbits_names)
            assert text is not None, cache.cache_dtype
            self._policy = read_policy(text, tuple(self._geometry), self._config)
            for index, (scheme, layer) in enumerate(zip(self._policy.layers, self._geometry, strict=True)):
                reason = self.backend.supports(scheme, layer)
                if reason:
                    raise UnsupportedError(f"layer {index} as '{scheme.name}': {reason}")
            log.info("KV cache: %s; kernels: %s", text, self._kernels(self._policy))
        return self._policy

    @property
    def backend(self) -> CpuBackend | TritonBackend:
        """The kernels; not made before vLLM has bound its threads, or set its device."""
        if self._backend is None:
            from vllm.platforms import current_platform

            self._backend = cast("CpuBackend | TritonBackend", choose_backend("auto", current_platform.device_type))
        return self._backend

    def _kernels(self, policy: Policy) -> str:
        if isinstance(self.backend, CpuBackend):
            return f"{self.backend.isa}, {self.backend.threads} threads"
        return kernels_line(self.backend, policy.layers, self._geometry)

    def open_blocks(self, requests: Ints) -> Ints:
        """``int32 [parities, len(requests), open frames]``: blocks of the open pages of the step that runs."""
        found = get_forward_context().attn_metadata
        names = self._known_groups(found)
        tables = [[found[name].table.numpy()[requests] for name in row] for row in names]
        return np.stack([np.stack(row, axis=1) for row in tables]).astype(np.int32)

    def open_frame(self, index: int) -> int:
        """Which of a request's open blocks holds a layer's page."""
        return self._frames[index]

    def _known_groups(self, tables: dict[str, OpenTable]) -> list[list[str]]:
        """``[parity][frame]``: a layer whose table is that of the blocks; the same frame of a layer for each parity."""
        if self._groups is None:
            groups, frames = [], []
            for parity in range(self.parities):
                names = [open_page_name(i, parity) for i in range(len(self._geometry))]
                order = list(dict.fromkeys(tables[name].group for name in names))
                groups.append([group[0] for group in order])
                frames.append([order.index(tables[name].group) for name in names])
            if any(row != frames[0] for row in frames):
                raise UnsupportedError("vLLM packs the two open pages of a request differently; run without drafts")
            self._frames, self._groups = frames[0], groups
            if isinstance(self.backend, CpuBackend):
                collapse_to_huge_pages()  # the first step: weights and blocks are where they stay
        return self._groups


def open_page_name(index: int, parity: int) -> str:
    """vLLM reads a layer's number from its name, and there must be one alone."""
    return f"kvbits_open_{'ab'[parity]}.{index}"
