"""Tiny random decoder models, one a family, in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

VOCAB = 97

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 40}

_FAMILIES: dict[str, dict] = {
    "llama": {"head_dim": 16},
    "qwen2": {"head_dim": 16},
    "qwen2-window": {
        "model_type": "qwen2", "head_dim": 16, "use_sliding_window": True, "sliding_window": 70, "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 32},
    "qwen3-window": {
        "model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 100,
        "num_hidden_layers": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
                        "sliding_attention"],
    },
    "mistral": {"head_dim": 16, "sliding_window": 50},
    "gemma2": {
        "head_dim": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 24,
        **_HYBRID,
    },
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 20, **_HYBRID},
    "phi3": {"sliding_window": 100},
    "olmo2": {},
    "gpt_oss": {
        "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **_HYBRID,
    },
    "mixtral": {"head_dim": 16, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "deepseek_v3": {
        "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    },
}  # fmt: skip

_MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_chunk_size": 16, "num_hidden_layers": 4,
}  # fmt: skip
_DELTA = {
    "head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHORT = {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4}

_HYBRIDS: dict[str, dict] = {
    "qwen3_next": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_next-dense": {**_DELTA, **_EXPERTS, "model_type": "qwen3_next", "mlp_only_layers": [0, 1, 2, 3]},
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "granitemoehybrid": {
        **_MAMBA, "layer_types": ["mamba", "attention", "mamba", "mamba"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 64, "attention_multiplier": 0.25,
    },
    "lfm2": {**_SHORT, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_SHORT, **_EXPERTS, "num_dense_layers": 1},
    "falcon_h1": {**_MAMBA, "num_hidden_layers": 3, "mamba_d_ssm": 128},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16,
        "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4, "chunk_size": 16, "head_dim": 16, "num_hidden_layers": 4,
    },
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "olmo_hybrid": {
        **_DELTA, "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
}  # fmt: skip

_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}  # fmt: skip
_SHARED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip

_LATENTS: dict[str, dict] = {
    "deepseek_v2": {**_LATENT, **_SHARED, "q_lora_rank": None},
    "deepseek_v2-dense": {**_LATENT, "model_type": "deepseek_v2", "first_k_dense_replace": 3},
    "deepseek_v3-plain": {**_LATENT, **_SHARED, "model_type": "deepseek_v3", "rope_interleave": False},
    "minicpm3": _LATENT,
    "glm4_moe_lite": {**_LATENT, **_SHARED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "youtu": _LATENT,
    "axk1": {**_LATENT, **_SHARED},
    "deepseek_v2-lite": {  # attention as DeepSeek-V2-Lite's
        **_LATENT, "model_type": "deepseek_v2", "num_hidden_layers": 2, "first_k_dense_replace": 2, "q_lora_rank": None,
        "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
}  # fmt: skip

LATENTS = ("deepseek_v3", *_LATENTS)
"""Models whose attention has latents."""

FAMILIES = tuple(_FAMILIES)
"""Names that :func:`tiny_config` and :func:`tiny_model` take."""

HYBRIDS = tuple(_HYBRIDS)
"""More of them: models whose attention stands beside recurrent layers."""


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    options = {**_COMMON, **(_FAMILIES | _HYBRIDS | _LATENTS).get(family, {}), **changes}
    return AutoConfig.for_model(options.pop("model_type", family), **options)


def tiny_model(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A float32 model in eval mode whose attention is far from uniform, so that a wrong key shows in the logits."""
    with torch.random.fork_rng(devices=[]):  # biases keep what a new model gives them
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    return randomized(model, seed)


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fill ``model`` with random weights large enough that attention matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.5 / fan_in**0.5))
            elif "sinks" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.float().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words ``w0`` ... and three special tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The same with a chat template: the messages' contents."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def save(
    model: torch.nn.Module, directory: object, tokenizer: Callable[[], PreTrainedTokenizerFast] | None = tiny_tokenizer
) -> str:
    """Write model and tokenizer as a Hugging Face directory."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer().save_pretrained(directory)
    return str(directory)
