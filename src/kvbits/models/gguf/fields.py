"""The fields of transformers' configuration of a model, from its GGUF file. No torch, no transformers."""

from __future__ import annotations

from typing import Any

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.gguf.families import FAMILIES, MIXTURES, Family
from kvbits.models.gguf.file import GgufFile
from kvbits.models.gguf.header import Strings
from kvbits.models.gguf.keys import Keys

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}
"""What llama.cpp takes for a vocabulary of SentencePiece whose file names no ids."""


def family_of(file: GgufFile) -> Family | None:
    """The family by which kvbits reads ``file``; ``None`` for one that it leaves to transformers."""
    mixture = MIXTURES.get(file.architecture) if file.own("expert_count") else None
    return mixture or FAMILIES.get(file.architecture)


def known_family(file: GgufFile) -> Family:
    """The same for a file that has one."""
    family = family_of(file)
    assert family is not None, file.architecture
    return family


def fields_of(file: GgufFile) -> dict[str, Any]:
    """The fields of the model in ``file``, whose family kvbits must know.

    Raises ``UnsupportedError`` naming a key that transformers' model cannot follow, ``ConfigError`` naming one that is
    missing or wrong.
    """
    family = known_family(file)
    if file.string("general.type", "model") != "model":
        kind = file.string("general.type")
        raise UnsupportedError(f"'{file.path.name}' is no language model: general.type is '{kind}'")
    keys = Keys(file)
    for key in ("nextn_predict_layers", *(() if family.experts else ("expert_count",))):
        if keys.take(key):
            raise keys.refuse(key, f"kvbits reads {family.model_type} models without it")
    if keys.take("attention.causal") is False:
        raise keys.refuse("attention.causal", "kvbits is causal")
    fields = _common(keys) | _special(file)
    family.finish(keys, fields)
    keys.refuse_rest()
    return fields


def _common(keys: Keys) -> dict[str, Any]:
    epsilon = keys.number("attention.layer_norm_rms_epsilon")
    if epsilon is None:
        raise ConfigError(f"'{keys.file.path}' has no {keys.name('attention.layer_norm_rms_epsilon')}")
    keys.take("attention.layer_norm_epsilon")
    heads = keys.integer("attention.head_count")
    return {
        "max_position_embeddings": keys.integer("context_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "rms_norm_eps": epsilon,
        "vocab_size": keys.integer("vocab_size", _rows_of_vocabulary(keys.file)),
        "tie_word_embeddings": _HEAD not in keys.file.tensors,
    }


def _rows_of_vocabulary(file: GgufFile) -> int:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Strings):
        return len(tokens)
    if _EMBEDDING in file.tensors:
        return file.tensors[_EMBEDDING].shape[0]
    raise ConfigError(f"'{file.path}' has neither a vocabulary nor the tensor {_EMBEDDING}")


def _special(file: GgufFile) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    sentencepiece = file.metadata.get("tokenizer.ggml.model") == "llama"
    for key, field in _IDS.items():
        value = file.token_id(f"{key}_token_id")
        if value is not None:
            found[field] = value
        elif key in _SENTENCEPIECE_IDS:
            found[field] = _SENTENCEPIECE_IDS[key] if sentencepiece else None
    return found
