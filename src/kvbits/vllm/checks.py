"""What vLLM can be asked for that kvbits' cache in it cannot do: refused by name before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from kvbits.codecs import policy_of
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry
from kvbits.errors import UnsupportedError

_DRAFTS = ("ngram",)
"""Methods of speculation that were tried; a draft model's layers would need pages of their own."""


def check_engine(config: Any, text: str) -> None:
    """Raise ``UnsupportedError`` for the first thing in a ``VllmConfig`` that does not go with the policy ``text``.

    ``ConfigError`` where the policy itself is wrong. Layers are looked at again, one by one, when they are made.
    """
    if config.model_config is not None:
        for reason in chain(_of_model(config.model_config), _of_engine(config), _of_policy(text, config)):
            raise UnsupportedError(f"kvbits' cache in vLLM ('{text}'): {reason}")


def geometry_of(config: Any) -> ModelGeometry:
    """What vLLM says of a model before its layers exist: every layer alike, its own share of the heads."""
    model, parallel = config.model_config, config.parallel_config
    dim = model.get_head_size()
    heads, kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
    layer = LayerGeometry(heads, kv_heads, dim, dim, dim**-0.5)
    return ModelGeometry(
        name=model.model,
        layers=(layer,) * model.get_total_num_hidden_layers(),
        max_position=model.max_model_len,
        vocab_size=model.get_vocab_size(),
    )


def _of_policy(text: str, config: Any) -> Iterator[str]:
    geometry = geometry_of(config)
    policy = policy_of(text, geometry, None)  # the rounding would need the weights
    if policy.sink is not None:
        yield "the first page has a dtype of its own; vLLM's blocks are all alike, so leave out '+sink:'"
    for index, (scheme, layer) in enumerate(zip(policy.layers, geometry.layers, strict=True)):
        reason = scheme.supports(layer)
        if reason:
            yield f"layer {index} as '{scheme.name}': {reason}"


def _of_model(model: Any) -> Iterator[str]:
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float32"):
        yield f"the model runs in {dtype}; its kernels take --dtype bfloat16 or float32"
    if model.use_mla:
        yield "the model has latent attention (MLA)"
    if model.is_hybrid or model.is_attention_free:
        yield "the model has recurrent layers"
    if model.uses_alibi:
        yield "the model has ALiBi"
    if model.is_encoder_decoder:
        yield "the model has an encoder"
    if model.runner_type != "generate":
        yield f"--runner {model.runner_type} is not generate"


def _of_engine(config: Any) -> Iterator[str]:
    cache, parallel, speculative = config.cache_config, config.parallel_config, config.speculative_config
    if cache.user_specified_block_size and cache.block_size != PAGE_TOKENS:
        yield f"--block-size {cache.block_size}: a block is a page of {PAGE_TOKENS} tokens"
    if cache.prefix_match_unit not in (None, PAGE_TOKENS):
        yield f"--prefix-match-unit {cache.prefix_match_unit}: a page is found whole or not at all"
    if cache.kv_cache_dtype_skip_layers:
        yield "--kv-cache-dtype-skip-layers: write a policy by layer, with bf16 for those"
    if config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        yield "a KV connector or offloading moves blocks whose last page lies elsewhere"
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "--disable-hybrid-kv-cache-manager: the open page needs a group of blocks of its own"
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, option) > 1:
            yield f"--{option.replace('_', '-')} {getattr(parallel, option)}"
    if parallel.use_ubatching:
        yield "two batches at once (--enable-dbo, --ubatch-size)"
    if config.use_v2_model_runner:
        yield "the second model runner: set VLLM_USE_V2_MODEL_RUNNER=0"
    if speculative is not None:
        if speculative.method not in _DRAFTS:
            yield f"speculation by '{speculative.method}': choose from {', '.join(_DRAFTS)}"
        if (speculative.num_speculative_tokens or 0) >= PAGE_TOKENS:
            yield f"{speculative.num_speculative_tokens} drafts a step: fewer than a page's {PAGE_TOKENS} can be undone"
