"""A tiny configuration of every family of decoders that transformers has: what the table in docs/models.md is made of.

A family is added by a line: its ``model_type`` and what its configuration needs beside :mod:`helpers.tiny`'s.
"""

from __future__ import annotations

from typing import Any

from helpers.tiny import FAMILIES, HYBRIDS, LATENTS, VOCAB

_TURNS = ["sliding_attention", "sliding_attention", "full_attention"]
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED = {
    **_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 96}
_PER_LAYER = {
    "num_hidden_layers": 6, "layer_types": _TURNS * 2, "num_kv_shared_layers": 3, "sliding_window": 40,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
    "short_factor": [1.0] * 8, "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0],
}  # fmt: skip

SHARING: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        **_PER_LAYER, "head_dim": 16, "laurel_rank": 8, "altup_num_inputs": 2, "intermediate_size": 96,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {**_PER_LAYER, "head_dim": 16, "global_head_dim": 32},
}  # fmt: skip
"""Families with layers that share another layer's keys and values."""

LLAMA4: dict[str, Any] = {
    "head_dim": 16, "num_hidden_layers": 4, "attention_chunk_size": 50, "no_rope_layer_interval": 2,
    "floor_scale": 16, "attn_scale": 0.5, "num_local_experts": 4, "intermediate_size_mlp": 96,
}  # fmt: skip
"""Chunks that end within pages, and layers whose queries' scale follows their positions."""

LONGROPE: dict[str, Any] = {
    "model_type": "phi3", "sliding_window": None, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 256,
}  # fmt: skip
"""Its factors change at 256 tokens."""

_OTHERS: dict[str, dict[str, Any]] = {
    "afmoe": {**_ROUTED, "head_dim": 16, "sliding_window": 40, "num_dense_layers": 1},
    "apertus": {},
    "arcee": {"head_dim": 16},
    "axk2": {},
    "bailing_hybrid": {},
    "big_bird": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 16},
    "cohere": {},
    "cohere2": {"sliding_window": 40, "layer_types": _TURNS},
    "cwm": {"head_dim": 16, "sliding_window": 40, "layer_types": _TURNS},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 4, "ffn_act_fn": {"name": "silu"}},
    },
    "deepseek_v4": {},
    "diffllama": {},
    "doge": {},
    "dots1": {"head_dim": 16, **_ROUTED},
    "ernie4_5": {"head_dim": 16},
    "ernie4_5_moe": {**_MOE, "moe_num_experts": 4, "moe_k": 2, "head_dim": 16},
    "exaone4": {"sliding_window": 40, "sliding_window_pattern": 3},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon_mamba": {},
    "flex_olmo": _MOE,
    "gemma": {"head_dim": 16},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {"head_dim": 16, **_ROUTED},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": {},
    "gptj": {**_GPT, "rotary_dim": 16},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granitemoe": {"attention_multiplier": 0.2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {
        "attention_multiplier": 0.2, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64,
    },
    "helium": {"head_dim": 16},
    "hy_v3": {"head_dim": 16, **_ROUTED},
    "hyperclovax": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "internlm3": {"head_dim": 16},
    "jais2": {"head_dim": 16},
    "jamba": {},
    "jetmoe": {},
    "kimi_linear": {},
    "llama4_text": LLAMA4,
    "longcat_flash": {
        "num_layers": 2, "num_key_value_heads": 4, "ffn_hidden_size": 96, "q_lora_rank": 24,
        "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 16, "head_dim": 16,
        "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "moe_topk": 6, "zero_expert_num": 2,
    },
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": {"head_dim": 16, **_MOE},
    "minimax": _MOE,
    "minimax_m2": {"head_dim": 16, **_MOE},
    "ministral": {"head_dim": 16, "sliding_window": 40, "layer_types": _TURNS},
    "ministral3": {
        "head_dim": 16, "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "modernbert-decoder": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "nanochat": {},
    "nemotron": {"head_dim": 16},
    "olmo": {},
    "olmo3": {"sliding_window": 40, "layer_types": _TURNS},
    "olmoe": _MOE,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3-longrope": LONGROPE,
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe-longrope": {
        "model_type": "phimoe", "num_local_experts": 4,
        "rope_parameters": {**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.2},
    },
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "recurrent_gemma": {},
    "rwkv": {},
    "seed_oss": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {},
    "starcoder2": {"sliding_window": 40},
    "t5": {},
    "vaultgemma": {"head_dim": 16, "sliding_window": 40, "layer_types": _TURNS},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
}  # fmt: skip

UNSTEADY = ("phimoe", "phimoe-longrope")
"""Their routers weigh two experts by rank: a last bit turns a token to another sum, whatever the cache."""

_NAMES = (*FAMILIES, *HYBRIDS, *(name for name in LATENTS if "-" not in name))

ZOO: dict[str, dict[str, Any]] = {name: {} for name in _NAMES} | SHARING | _OTHERS
"""What :func:`helpers.tiny.tiny_config` and :func:`helpers.tiny.tiny_model` need of each family, by name."""
