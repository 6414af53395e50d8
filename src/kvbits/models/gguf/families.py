"""Model families whose GGUF files kvbits reads itself: keys to transformers' configuration, and what llama.cpp's
converter did to the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvbits.models.gguf.keys import Keys
from kvbits.models.gguf.rope import rope_parameters

Fields = dict[str, Any]
_SOFTMAX = 1


@dataclass(frozen=True)
class Family:
    """``model_type`` is transformers'; ``permuted``: Q and K have the rows of each head's halves interleaved;
    ``experts``: a mixture of them; ``one_more``: the norms' weights have 1 added; ``finish`` turns the common fields
    into the family's own."""

    model_type: str
    finish: Callable[[Keys, Fields], None]
    permuted: bool = False
    experts: bool = False
    one_more: bool = False


def _head_dim(keys: Keys, fields: Fields, default: int | None = None) -> int:
    size = fields["hidden_size"] // fields["num_attention_heads"] if default is None else default
    dim = keys.integer("attention.key_length", size)
    if keys.integer("attention.value_length", dim) != dim:
        raise keys.refuse("attention.value_length", f"keys have {dim}; kvbits reads families whose heads have one size")
    return dim


def _whole(keys: Keys, dim: int) -> None:
    """All dimensions of a head are rotated."""
    if keys.integer("rope.dimension_count", dim) != dim:
        raise keys.refuse("rope.dimension_count", f"a head has {dim} dimensions, and this family rotates all of them")


def _scale(keys: Keys, expected: float) -> None:
    scale = keys.number("attention.scale") or expected
    if abs(scale - expected) > 1e-5 * expected:
        raise keys.refuse("attention.scale", f"this family multiplies scores with {expected:.6g}")


def _plain(keys: Keys, fields: Fields) -> int:
    """One rotary embedding, rotating whole heads, scores divided by the square root of their size."""
    dim = _head_dim(keys, fields)
    _whole(keys, dim)
    _scale(keys, dim**-0.5)
    fields["rope_parameters"] = rope_parameters(keys, dim, fields["max_position_embeddings"])
    return dim


def _llama(keys: Keys, fields: Fields) -> None:
    if "attention.key_length" not in _own(keys) and keys.take("rope.dimension_count"):
        fields["head_dim"] = keys.integer("rope.dimension_count")
        _scale(keys, fields["head_dim"] ** -0.5)
        fields["rope_parameters"] = rope_parameters(keys, fields["head_dim"], fields["max_position_embeddings"])
        keys.take("attention.value_length")
    else:
        fields["head_dim"] = _plain(keys, fields)
    _biases(keys, fields)
    if "blk.0.ffn_down.bias" in keys.file.tensors:
        fields["mlp_bias"] = True


def _qwen2(keys: Keys, fields: Fields) -> None:
    dim = _plain(keys, fields)
    if dim * fields["num_attention_heads"] != fields["hidden_size"]:
        fields["head_dim"] = dim


def _qwen3(keys: Keys, fields: Fields) -> None:
    fields["head_dim"] = _plain(keys, fields)
    _biases(keys, fields)


def _qwen3moe(keys: Keys, fields: Fields) -> None:
    _qwen3(keys, fields)
    _experts(keys, fields, normalized=True)


def _qwen2moe(keys: Keys, fields: Fields) -> None:
    _qwen2(keys, fields)
    _experts(keys, fields, normalized=False)
    fields["shared_expert_intermediate_size"] = keys.integer("expert_shared_feed_forward_length")


def _mixtral(keys: Keys, fields: Fields) -> None:
    fields["head_dim"] = _plain(keys, fields)
    fields["num_local_experts"] = keys.integer("expert_count")
    if keys.take("expert_weights_norm") is False:
        raise keys.refuse("expert_weights_norm", "this family's shares are of the chosen experts")
    _router(keys, fields)


def _experts(keys: Keys, fields: Fields, normalized: bool) -> None:
    """Every layer is a mixture; ``normalized``: what llama.cpp does where the file does not say."""
    fields["num_experts"] = keys.integer("expert_count")
    fields["moe_intermediate_size"] = keys.integer("expert_feed_forward_length")
    asked = keys.take("expert_weights_norm")
    fields["norm_topk_prob"] = normalized if asked is None else bool(asked)
    _router(keys, fields)


def _router(keys: Keys, fields: Fields) -> None:
    """A softmax over all experts, of which some are taken."""
    fields["num_experts_per_tok"] = keys.integer("expert_used_count")
    if keys.take("expert_gating_func") not in (None, 0, _SOFTMAX):
        raise keys.refuse("expert_gating_func", f"kvbits does {_SOFTMAX}, a softmax")
    if (keys.number("expert_weights_scale") or 1.0) != 1:
        raise keys.refuse("expert_weights_scale", "kvbits does 1")


def _phi3(keys: Keys, fields: Fields) -> None:
    dim = _head_dim(keys, fields)
    _scale(keys, dim**-0.5)
    rotated = keys.integer("rope.dimension_count", dim)
    context = fields["max_position_embeddings"]
    rope = rope_parameters(keys, rotated, context)
    if rope["rope_type"] not in ("default", "longrope"):
        raise keys.refuse("rope.scaling.type", "transformers' Phi-3 does longrope only")
    rope["partial_rotary_factor"] = rotated / dim
    fields["rope_parameters"] = rope
    if "original_max_position_embeddings" in rope:
        fields["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    window = keys.take("attention.sliding_window")
    if window and window < context:
        fields["sliding_window"] = window


def _olmo2(keys: Keys, fields: Fields) -> None:
    _plain(keys, fields)
    _biases(keys, fields)


def _gemma(keys: Keys, fields: Fields) -> None:
    dim = _head_dim(keys, fields)
    _whole(keys, dim)
    _scale(keys, dim**-0.5)
    fields["head_dim"] = dim
    fields["rope_parameters"] = rope_parameters(keys, dim, fields["max_position_embeddings"])


def _gemma2(keys: Keys, fields: Fields) -> None:
    _gemma_scale(keys, fields, largest=46)
    fields["rope_parameters"] = _same_base(keys, fields)
    _windows(keys, fields, every=2, default=4096)
    fields["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0) or None
    fields["final_logit_softcapping"] = keys.number("final_logit_softcapping", 30.0) or None


def _gemma3(keys: Keys, fields: Fields) -> None:
    _gemma_scale(keys, fields, largest=62)
    far = rope_parameters(keys, fields["head_dim"], fields["max_position_embeddings"])
    near = keys.number("rope.freq_base_swa") or keys.number("rope.local.freq_base") or 10000.0
    fields["rope_parameters"] = {
        "full_attention": far,
        "sliding_attention": {"rope_type": "default", "rope_theta": near},
    }
    _windows(keys, fields, every=6, default=None)
    softcap = keys.number("final_logit_softcapping")
    if softcap:
        fields["final_logit_softcapping"] = softcap
    softcap = keys.number("attn_logit_softcapping")
    if softcap:
        fields["attn_logit_softcapping"] = softcap


def _gemma_scale(keys: Keys, fields: Fields, largest: int) -> None:
    """Scores are divided by the root of the head's size, in the model of 27B (known by its layers) by that of
    hidden size over heads: the files say it in no key."""
    dim = _head_dim(keys, fields)
    _whole(keys, dim)
    fields["head_dim"] = dim
    by_hidden = fields["num_hidden_layers"] == largest
    scalar = fields["hidden_size"] // fields["num_attention_heads"] if by_hidden else dim
    scale = keys.number("attention.scale")
    fields["query_pre_attn_scalar"] = round(scale**-2) if scale else scalar


def _same_base(keys: Keys, fields: Fields) -> Fields:
    base = keys.number("rope.freq_base_swa")
    if base is not None and base != keys.number("rope.freq_base", 1e4):
        raise keys.refuse("rope.freq_base_swa", "this family has one base for all layers")
    return rope_parameters(keys, fields["head_dim"], fields["max_position_embeddings"])


def _windows(keys: Keys, fields: Fields, every: int, default: int | None) -> None:
    """``sliding_window`` and the layers that have it: all but every n-th, or as an array says."""
    window = keys.take("attention.sliding_window")
    window = default if window is None else window
    flags = keys.array("attention.sliding_window_pattern")
    count = fields["num_hidden_layers"]
    if flags is None:
        every = keys.integer("attention.sliding_window_pattern", every)
        flags = [bool((i + 1) % every) for i in range(count)]
    if len(flags) < count:
        raise keys.refuse("attention.sliding_window_pattern", f"the model has {count} layers")
    if not window:
        flags = [False] * count
    else:
        fields["sliding_window"] = window
    fields["layer_types"] = ["sliding_attention" if flag else "full_attention" for flag in flags[:count]]


def _biases(keys: Keys, fields: Fields) -> None:
    if "blk.0.attn_q.bias" in keys.file.tensors:
        fields["attention_bias"] = True


def _own(keys: Keys) -> set[str]:
    prefix = keys.name("")
    return {name.removeprefix(prefix) for name in keys.file.metadata if name.startswith(prefix)}


FAMILIES = {
    "llama": Family("llama", _llama, permuted=True),
    "qwen2": Family("qwen2", _qwen2),
    "qwen3": Family("qwen3", _qwen3),
    "qwen2moe": Family("qwen2_moe", _qwen2moe, experts=True),
    "qwen3moe": Family("qwen3_moe", _qwen3moe, experts=True),
    "phi3": Family("phi3", _phi3),
    "olmo2": Family("olmo2", _olmo2),
    "gemma": Family("gemma", _gemma, one_more=True),
    "gemma2": Family("gemma2", _gemma2, one_more=True),
    "gemma3": Family("gemma3_text", _gemma3, one_more=True),
}
"""By ``general.architecture``."""

MIXTURES = {"llama": Family("mixtral", _mixtral, permuted=True, experts=True)}
"""The same for files with experts, where that is another model."""
