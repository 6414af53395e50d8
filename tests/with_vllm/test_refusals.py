"""Layers and models that vLLM has and kvbits' cache in it cannot serve, as vLLM itself makes them (no engine)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.cross_attention import CrossAttention
from vllm.model_executor.layers.attention.encoder_only_attention import EncoderOnlyAttention
from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import PrefillPrefixLMAttention
from vllm.model_executor.layers.attention.static_sink_attention import StaticSinkAttention

from kvbits.errors import UnsupportedError
from kvbits.vllm import register
from kvbits.vllm.backend import KvbitsImpl

pytestmark = pytest.mark.vllm

Make = Callable[..., Attention]


@pytest.fixture
def make() -> Iterator[Make]:
    """Layers of one model with 4 heads of 32, in vLLM's current configuration."""
    register()
    config = VllmConfig(additional_config={"kvbits": {"policy": "int4"}})
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(config):
        made = 0

        def layer(kind: type[Attention], **options: Any) -> Attention:
            nonlocal made
            made += 1
            return kind(4, 32, 0.2, cache_config=config.cache_config, prefix=f"layers.{made}.attn", **options)

        yield layer
    torch.set_default_dtype(dtype)


def test_a_plain_layer_is_served(make: Make) -> None:
    assert isinstance(make(Attention).impl, KvbitsImpl)
    assert isinstance(make(Attention, per_layer_sliding_window=70).impl, KvbitsImpl)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(ChunkedLocalAttention, {"attention_chunk_size": 128}), (PrefillPrefixLMAttention, {}),
     (StaticSinkAttention, {"sink_len": 64})],
)  # fmt: skip
def test_layers_with_metadata_of_their_own_are_refused(make: Make, kind: type[Attention], options: dict) -> None:
    """By the next layer, before any weights are there; a last one by itself, before memory is asked for."""
    first = make(kind, **options)
    with pytest.raises(UnsupportedError, match=rf"asks for {kind.__name__} \(layers.1.attn\)"):
        make(Attention)
    with pytest.raises(UnsupportedError, match=rf"asks for {kind.__name__}"):
        first.impl.process_weights_after_loading(torch.bfloat16)


@pytest.mark.parametrize("kind", [CrossAttention, EncoderOnlyAttention])
def test_encoders_are_refused(make: Make, kind: type[Attention]) -> None:
    with pytest.raises(UnsupportedError, match="attention type"):
        make(kind)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"kv_sharing_target_layer_name": "layers.0.attn"}, "shared with 'layers.0.attn'"),
        ({"new_feature": 1}, "'new_feature'"),
    ],
)
def test_what_a_layer_asks_for_is_refused(make: Make, options: dict, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        make(Attention, **options)
