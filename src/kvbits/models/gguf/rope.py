"""Rotary embeddings as a GGUF file describes them, in transformers' ``rope_parameters``.

Three places say how angles are scaled: the keys ``rope.scaling.*``, the tensor ``rope_freqs.weight`` (a divisor for
every frequency, Llama 3.1 and later) and the tensors ``rope_factors_short.weight`` and ``rope_factors_long.weight``
(LongRoPE, arXiv:2402.13753). YaRN is arXiv:2309.00071 as llama.cpp and transformers both do it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvbits.errors import ConfigError, UnsupportedError
from kvbits.models.gguf.keys import Keys

_FREQUENCIES = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
TENSORS = frozenset({_FREQUENCIES, _SHORT, _LONG})
"""Tensors that belong to the configuration, not to the weights."""

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published model with Llama 3's scaling has beside its factor."""


def rope_parameters(keys: Keys, dims: int, context: int) -> dict[str, Any]:
    """The rotary embedding of ``dims`` rotated dimensions for a model of ``context`` tokens.

    Raises ``UnsupportedError`` naming the key or tensor that transformers cannot express, ``ConfigError`` for values
    that cannot be.
    """
    parameters: dict[str, Any] = {"rope_type": "default"}
    base = keys.number("rope.freq_base")
    if base is not None:
        if not base > 0:
            raise ConfigError(f"{keys.name('rope.freq_base')} is {base}; it must be positive")
        parameters["rope_theta"] = base
    parameters |= _scaling(keys, dims, context)
    divisors = _divisors(keys, _FREQUENCIES, dims)
    if divisors is None or np.all(divisors == 1):
        return parameters
    if parameters["rope_type"] not in ("default", "linear"):
        raise UnsupportedError(
            f"'{keys.file.path.name}' has the tensor {_FREQUENCIES} and {keys.name('rope.scaling.type')} "
            f"'{parameters['rope_type']}'; kvbits does one of them"
        )
    divisors = divisors * parameters.pop("factor", 1.0)
    return parameters | (_llama3(divisors, base or 1e4, dims) or _fixed(divisors.tolist(), context))


def _scaling(keys: Keys, dims: int, context: int) -> dict[str, Any]:
    kind = keys.take("rope.scaling.type")
    factor = keys.number("rope.scaling.factor") or keys.number("rope.scale_linear") or 1.0
    original = keys.take("rope.scaling.original_context_length") or context
    attention = keys.number("rope.scaling.attn_factor", 1.0) or 1.0
    if not factor > 0:
        raise ConfigError(f"{keys.name('rope.scaling.factor')} is {factor}; it must be positive")
    if kind in (None, "none", "linear"):
        if attention != 1:
            raise keys.refuse("rope.scaling.attn_factor", "kvbits does it with yarn and longrope only")
        return {} if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(keys, factor, int(original), attention)
    if kind in ("longrope", "su"):
        return _longrope(keys, dims, context, int(original), attention)
    raise keys.refuse("rope.scaling.type", "kvbits does none, linear, yarn and longrope")


def _yarn(keys: Keys, factor: float, original: int, attention: float) -> dict[str, Any]:
    for key in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        if keys.number(key, 1.0) not in (1.0, -1.0):
            raise keys.refuse(key, "kvbits does yarn with 1 only")
    if keys.number("rope.scaling.yarn_log_multiplier"):
        raise keys.refuse("rope.scaling.yarn_log_multiplier", "kvbits does yarn without one")
    parameters = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if attention != 1:
        parameters["attention_factor"] = attention * (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return parameters


def _longrope(keys: Keys, dims: int, context: int, original: int, attention: float) -> dict[str, Any]:
    short, long = (_divisors(keys, name, dims) for name in (_SHORT, _LONG))
    if short is None or long is None:
        raise ConfigError(
            f"'{keys.file.path}' says {keys.name('rope.scaling.type')} longrope and has no tensors {_SHORT} and {_LONG}"
        )
    if context <= original:  # the long factors are never reached
        return _fixed(short.tolist(), context) | {"attention_factor": attention}
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _fixed(divisors: list[float], context: int) -> dict[str, Any]:
    """Frequencies divided by ``divisors`` whatever the length: LongRoPE whose two sets are one."""
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
    }


def _llama3(divisors: np.ndarray, base: float, dims: int) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that give ``divisors``, if there are any."""
    factor = float(np.round(divisors.max(), 4))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = _LLAMA3["original_max_position_embeddings"] / (2 * math.pi * base ** (np.arange(0, dims, 2) / dims))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3} if np.allclose(expected, divisors, 1e-4, 0) else None


def _divisors(keys: Keys, name: str, dims: int) -> np.ndarray | None:
    tensor = keys.file.tensors.get(name)
    if tensor is None:
        return None
    if tensor.kind.name != "F32" or tensor.shape != (dims // 2,):
        raise ConfigError(
            f"tensor {name} of '{keys.file.path}' is {tensor.kind.name} {list(tensor.shape)}; it must be F32 "
            f"[{dims // 2}]"
        )
    values = tensor.rows().reshape(-1).view(np.float32).astype(np.float64)
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ConfigError(f"tensor {name} of '{keys.file.path}' has values that are not positive numbers")
    return values
