"""Bytes of weights and of a step's workspace."""

from __future__ import annotations

from kvbits.config import parse_bytes
from kvbits.errors import ConfigError
from kvbits.planning.facts import ModelFacts, Parameters

WEIGHT_BITS: dict[str, float] = {
    "fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "w8a8": 8, "awq": 4.15625, "gptq": 4.15625, "int8": 9, "int4": 5,
}  # fmt: skip
"""Bits per weight. ``awq`` and ``gptq``: groups of 128 with a 16-bit scale and a 4-bit zero point; ``int8`` and
``int4``: kvbits' own, embeddings too, groups of 32 with a 16-bit scale and a 16-bit minimum."""

QUANTIZED = frozenset({"fp8", "w8a8", "awq", "gptq"})
"""Dtypes that checkpoints use for all but the embeddings and the output head, which stay in 16 bits."""

MXFP4 = "mxfp4"
"""Experts in 4-bit blocks of 32 with an 8-bit scale (OCP microscaling), everything else in 16 bits: gpt-oss."""

_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def planned_bytes(facts: ModelFacts, weights: str) -> int:
    """Bytes of the weights of ``facts`` in the form ``weights``: as they will be held where that is known, otherwise
    as :func:`weights_bytes` says. ``auto`` is the default."""
    name = weights.strip().lower()
    name = facts.weights if name == "auto" else _ALIASES.get(name, name)
    return facts.held[name] if name in facts.held else weights_bytes(facts.parameters, name)


def weights_bytes(parameters: Parameters, weights: str) -> int:
    """Bytes of all weights, ``weights`` being a dtype or a size such as ``16GiB``.

    Raises ``ConfigError`` when it is neither.
    """
    name = _ALIASES.get(weights.strip().lower(), weights.strip().lower())
    rest = parameters.total - parameters.embeddings
    if name == MXFP4:
        return round(parameters.experts * 4.25 / 8 + (parameters.total - parameters.experts) * 2)
    if name in QUANTIZED:
        return round(rest * WEIGHT_BITS[name] / 8 + parameters.embeddings * 2)
    if name in WEIGHT_BITS:
        return round(parameters.total * WEIGHT_BITS[name] / 8)
    try:
        return parse_bytes(weights)
    except ConfigError as error:
        names = ", ".join(["auto", *WEIGHT_BITS, MXFP4])
        raise ConfigError(f"unknown weights '{weights}'; choose from {names}, or give a size such as 16GiB") from error


def workspace_bytes(facts: ModelFacts, batched_tokens: int, sequences: int, ranks: int = 1) -> int:
    """An estimate of what a step needs beside weights and cache, on one of ``ranks`` devices.

    In 16 bits for each of ``batched_tokens`` tokens: the residual stream, its normalized copy and the layer's output,
    queries, keys, values and the attention's output, and the two inner vectors of the feed-forward layer. In float32
    for each sequence: its logits and a copy.
    """
    layer = max(facts.geometry.layers, key=lambda g: g.num_heads * (g.key_dim + g.value_dim))
    heads = layer.num_heads * (layer.key_dim + layer.value_dim)
    shared = 3 * facts.hidden
    split = (heads + 2 * facts.widest) // ranks
    return 2 * batched_tokens * (shared + split) + 2 * 4 * sequences * facts.geometry.vocab_size // ranks
