"""Layer geometry from the fields of a Hugging Face ``config.json``. No torch, no transformers.

Knows the fields that the tables of ``models.json`` use. A model that is loaded is measured instead
(:func:`kvbits.models.geometry_of`), and the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from kvbits.config import LayerGeometry
from kvbits.errors import ConfigError

_RECURRENT = ("mamba_", "linear_key_", "ssm_", "conv_L")
"""How names of fields of recurrent layers begin."""

_KINDS = ("mamba", "mamba2", "linear_attention", "conv", "hybrid")
"""What recurrent layers are called where every layer has a name."""

MLA = Literal["latent", "expanded"]
"""What a cache stores of multi-head latent attention: the compressed latent, or every head's keys and values."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def has_states(config: Mapping[str, Any]) -> bool:
    """Whether there may be recurrent layers, whose place among the others these fields do not say in one way."""
    return any(name.startswith(_RECURRENT) for name in config)


def surely_recurrent(config: Mapping[str, Any]) -> bool:
    """Whether some layers are recurrent for certain: they are named so, or the family has no others."""
    kinds = [*(config.get("layer_types") or ()), *(config.get("layers_block_type") or ())]
    pattern = str(config.get("hybrid_override_pattern") or "")
    families = ("bamba", "falcon_h1", "qwen3_next")
    if kinds or pattern:
        return any(kind in _KINDS for kind in kinds) or "M" in pattern
    return config.get("model_type") in families


def layers_of(config: Mapping[str, Any], mla: MLA = "latent") -> tuple[LayerGeometry, ...]:
    """Every layer's geometry.

    Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) caches for each token one latent of
    ``kv_lora_rank`` elements and one rotary key of ``qk_rope_head_dim``, shared by all heads: ``latent`` describes them
    as one KV head whose key is both and whose value is the latent in it, 512 + 64 elements for DeepSeek-V3.
    ``expanded`` is what an attention that knows nothing of the latent stores: keys and values of every head. Raises
    ``ConfigError`` naming a field that is missing.
    """
    heads = _positive(config, "num_attention_heads")
    count = _positive(config, "num_hidden_layers")
    if "kv_lora_rank" in config:
        rope, value = _positive(config, "qk_rope_head_dim"), _positive(config, "v_head_dim")
        key = _positive(config, "qk_nope_head_dim") + rope
        rank = _positive(config, "kv_lora_rank")
        if mla == "latent":
            return (LayerGeometry(heads, 1, rank + rope, rank, key**-0.5, latent=True),) * count
        return (LayerGeometry(heads, heads, key, value, key**-0.5),) * count
    kv_heads = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or _positive(config, "hidden_size") // heads)
    windows = _windows(config, count)
    return tuple(LayerGeometry(heads, kv_heads, dim, dim, dim**-0.5, window) for window in windows)


def _windows(config: Mapping[str, Any], count: int) -> list[int | None]:
    """Each layer's sliding window: of all layers, of those named ``sliding_attention``, or of all but every n-th."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return [None] * count
    kinds = config.get("layer_types")
    if kinds is not None:
        return [int(window) if kind == "sliding_attention" else None for kind in kinds]
    every = config.get("sliding_window_pattern")
    return [None if every and (i + 1) % every == 0 else int(window) for i in range(count)]


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value <= 0:
        raise ConfigError(f"the configuration's {name} is {value!r}; it must be a positive whole number")
    return value
