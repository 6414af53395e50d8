"""How a model's publisher wants its tokens chosen: the fields of its generation configuration that kvbits obeys.

They are those that vLLM takes from a ``generation_config.json``. Few GGUF files say them
(``general.sampling.*``); for the others there is a table of what the publishers of some families say.
"""

from __future__ import annotations

import re
from typing import Any

from kvbits.models.gguf.file import GgufFile

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

_KEYS = {
    "temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "penalty_repeat": "repetition_penalty"
}  # fmt: skip

_PUBLISHED: tuple[tuple[str, dict[str, float]], ...] = (
    # the example of the models' cards, and a penalty without which the small one often ends in a loop: with 1.1 that
    # was so in 2 of 30 answers of 256 tokens, with 1.15 in none; 1.2 spoils code
    ("smollm2-135m", {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.15}),
    ("smollm2", {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}),
    # generation_config.json of the instruct models
    ("qwen2.5-coder", {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}),
    ("qwen2.5", {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}),
    ("qwen3", {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
    ("gemma-3", {"top_p": 0.95, "top_k": 64}),
    ("llama-3", {"temperature": 0.6, "top_p": 0.9}),
)


def sampling_defaults(generation: Any) -> dict[str, float]:
    """What a transformers ``GenerationConfig`` says of :data:`FIELDS` (``None``: nothing)."""
    said = {} if generation is None else generation.to_diff_dict()
    return {name: said[name] for name in FIELDS if said.get(name) is not None}


def published(file: GgufFile) -> dict[str, float]:
    """What a GGUF file says of :data:`FIELDS`, or else the publisher of its family; empty where neither is known."""
    own = {field: file.metadata.get(f"general.sampling.{key}") for key, field in _KEYS.items()}
    said = {field: value for field, value in own.items() if isinstance(value, int | float)}
    if said:
        return said
    names = [file.metadata.get(f"general.{key}") for key in ("basename", "name")]
    plain = [re.sub(r"[\s_]+", "-", str(name or "").lower()) for name in names]
    for family, fields in _PUBLISHED:
        if any(name.startswith((family, f"meta-{family}")) for name in plain):
            return dict(fields)
    return {}
