"""GGUF files of tiny models, written with the ``gguf`` package as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants

from helpers.tiny import VOCAB

NAMES = {"gemma3_text": "gemma3", "mixtral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
"""transformers' model types whose architecture has another name in GGUF."""

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB - 2)), "w", "4"]


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The weights under GGUF's names: rows of Llama's Q and K interleaved, 1 added to Gemma's norms."""
    config = model.config
    arch = NAMES.get(config.model_type, config.model_type)
    key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch)
    names = get_tensor_name_map(key, config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        values = parameter.detach().float().numpy().copy()
        if ".experts." in name:
            layer = name.split(".")[2]
            if stem.endswith("experts") and suffix == "gate_up_proj":
                for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                    found[f"blk.{layer}.ffn_{part}_exps.weight"] = half
            else:
                found[f"blk.{layer}.ffn_down_exps.weight"] = values
            continue
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        stored = names.get_name(stem) or {"lm_head": "output"}[stem]
        if arch == "llama" and stored.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if stored.endswith("q") else config.num_key_value_heads
            values = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:]).swapaxes(1, 2)
            values = values.reshape(parameter.shape)
        if arch.startswith("gemma") and stored.endswith("norm"):
            values = values + 1
        found[f"{stored}.{suffix}"] = values
    return found


def metadata_of(model: Any) -> dict[str, Any]:
    """The model's keys without ``general.architecture``."""
    config = model.config
    arch = NAMES.get(config.model_type, config.model_type)
    rope = config.rope_parameters
    base = rope["full_attention"]["rope_theta"] if "full_attention" in rope else rope["rope_theta"]
    found = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(base),
    }
    if getattr(config, "head_dim", None):
        found |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if arch in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        found["attention.sliding_window"] = config.sliding_window
    if arch.endswith("moe"):
        found["expert_count"], found["expert_used_count"] = config.num_experts, config.num_experts_per_tok
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if config.model_type == "mixtral":
        found["expert_count"], found["expert_used_count"] = config.num_local_experts, config.num_experts_per_tok
    if arch == "qwen2moe":
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return {f"{arch}.{name}": value for name, value in found.items()}


def word_vocabulary() -> dict[str, Any]:
    """A byte-level vocabulary of words and one merge, with the special tokens of the tiny models."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": WORDS,
        "tokenizer.ggml.token_type": [3, 3, 3, 2] + [1] * (VOCAB - 4),
        "tokenizer.ggml.merges": ["w 4"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
    }


def write(
    path: Path,
    arch: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kinds: dict[str, GGMLQuantizationType] | None = None,
) -> Path:
    """One GGUF file; ``kinds`` quantizes the tensors that it names, or says what their bytes are."""
    writer = GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is not None and values.dtype == np.uint8:
            writer.add_tensor(name, values, raw_dtype=kind)
        elif kind is None:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        else:
            writer.add_tensor(name, quants.quantize(np.ascontiguousarray(values, np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_gguf(
    model: Any,
    path: Path,
    changes: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    vocabulary: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    """``model`` as a GGUF file. ``changes`` to the metadata, ``None`` for a key to leave out; ``extra`` tensors."""
    arch = NAMES.get(model.config.model_type, model.config.model_type)
    tokens = word_vocabulary() if vocabulary is None else vocabulary
    metadata = {**metadata_of(model), **tokens, **(changes or {})}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return str(write(path, arch, metadata, tensors_of(model) | (extra or {}), **options))


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether both have the same parameters and buffers, to the bit."""
    left, right = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
