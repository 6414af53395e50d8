"""kvbits' kernels as an attention backend of vLLM (``vllm/v1/attention/backend.py``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from kvbits.codecs import OPEN, Scheme
from kvbits.config import PAGE_TOKENS, LayerGeometry
from kvbits.errors import UnsupportedError
from kvbits.pool import LayerView
from kvbits.vllm.blocks import PageBackend
from kvbits.vllm.shared import Shared
from kvbits.vllm.step import Step
from kvbits.vllm.views import view_of


class KvbitsBackend(PageBackend):
    """A block holds 64 tokens: a page of ``scheme``, which a subclass names for each scheme of a policy.

    The bytes of a page are no rows, one a token; vLLM gets them as ``head_bytes / 64`` bytes a token and head, which is
    a whole number, pages being multiples of 64 bytes.
    """

    scheme: ClassVar[Scheme] = OPEN
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = []  # those that the platform sends here

    @staticmethod
    def get_impl_cls() -> type[KvbitsImpl]:
        return KvbitsImpl

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        layer = LayerGeometry(spec.num_kv_heads, spec.num_kv_heads, spec.head_size, spec.head_size_v, 1.0)
        size, rest = divmod(cls.scheme.head_bytes(layer), PAGE_TOKENS)
        assert rest == 0, cls.scheme
        return replace(spec, dtype=torch.uint8, kv_quant_mode=KVQuantMode.NONE, state_content_bytes=size)


@cache
def backend_of(scheme: Scheme) -> type[KvbitsBackend]:
    """The backend of layers stored as ``scheme``; vLLM tells backends apart by their names."""
    return type(f"KvbitsBackend[{scheme.name}]", (KvbitsBackend,), {"scheme": scheme, "__module__": __name__})


class StepBuilder(AttentionMetadataBuilder[Any]):
    """Metadata of a step, one for all layers of a group.

    Grids are of the step's own size, and tables are made on the host: no CUDA graph may hold a launch. vLLM's
    piecewise graphs leave attention out.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        found = common_attn_metadata
        assert found.causal is True, "a layer that is not causal was not refused"
        return Step.of(found.num_reqs, found.query_start_loc_cpu, found.seq_lens, found.block_table_tensor)


class KvbitsImpl(AttentionImpl[Any]):
    """One layer: appends a step's rows, seals full pages, attends."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        _refuse(
            {
                "ALiBi": alibi_slopes is not None,
                f"attention of type '{attn_type}'": attn_type != AttentionType.DECODER,
                f"keys and values shared with '{kv_sharing_target_layer_name}'": kv_sharing_target_layer_name,
                **{f"'{name}'": value for name, value in others.items()},
            }
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sinks = sinks
        self.geometry = LayerGeometry(
            num_heads,
            self.num_kv_heads,
            head_size,
            head_size,
            self.scale,
            window=sliding_window,
            softcap=logits_soft_cap or None,
            sinks=sinks is not None,
        )
        config = get_current_vllm_config()
        known = list(_attention(config.compilation_config.static_forward_context.values()))
        self.shared = known[0].impl.shared if known else Shared(config)
        self.index = self.shared.add(self.geometry)
        self._view: tuple[Tensor, LayerView] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Weights are there, memory is not yet asked for: the policy is read, and every layer gets its backend."""
        if self.sinks is not None:
            self.sinks = self.sinks.detach().float().contiguous()
        for layer in list(_attention(self.shared.layers())):
            impl = layer.impl
            _refuse({f"values of another size than keys ({layer.layer_name})": layer.head_size_v != impl.head_size})
            layer.attn_backend = backend_of(self.shared.policy.layers[impl.index])

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """``query`` ``[tokens, heads, dim]``, ``key`` and ``value`` ``[tokens, kv_heads, dim]``, all of the model's
        dtype; what is padding beyond the step's rows stays as it is in ``output``."""
        assert output_scale is None, "vLLM fuses an output's quantization only where the backend says it can"
        if attn_metadata is None:  # vLLM looks how much memory a step takes
            return output
        batch = attn_metadata.batch(self.shared)
        rows = batch.num_rows
        if self._view is None or self._view[0] is not kv_cache:
            self._view = kv_cache, view_of(kv_cache, self.index, self.geometry, self.shared)
            self.shared.backend.prepare([self._view[1]])
        given = query, key, value, output
        if len(query) != rows:
            given = query[:rows], key[:rows], value[:rows], output[:rows]
        self.shared.backend.forward(self._view[1], batch, *given[:3], self.sinks, given[3])
        return output


def _attention(layers: Iterable[Any]) -> Iterator[Attention]:
    """Those that attend. What vLLM derives from its attention changes the step's metadata, by a backend that it makes
    from the layer's: attention in chunks, prefixes that see what comes after them."""
    for layer in layers:
        if isinstance(layer, Attention):
            own = isinstance(layer.impl, KvbitsImpl)
            _refuse({f"{type(layer).__name__} ({layer.layer_name})": type(layer) is not Attention or not own})
            yield layer


def _refuse(asked: dict[str, Any]) -> None:
    for what, wanted in asked.items():
        if wanted:
            raise UnsupportedError(f"kvbits' cache in vLLM cannot serve this model: a layer asks for {what}")
