"""kvbits: serve long-context language models from a quantized key/value cache."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbits.codecs import Codec, Policy, Scheme
    from kvbits.engine.config import EngineConfig
    from kvbits.engine.engine import Engine
    from kvbits.engine.outputs import CompletionOutput, RequestOutput
    from kvbits.engine.params import SamplingParams
    from kvbits.llm import LLM
    from kvbits.models import load_model

__version__ = "0.2.0"

_HOME = {
    "LLM": "kvbits.llm",
    "SamplingParams": "kvbits.engine.params",
    "RequestOutput": "kvbits.engine.outputs",
    "CompletionOutput": "kvbits.engine.outputs",
    "Engine": "kvbits.engine.engine",
    "EngineConfig": "kvbits.engine.config",
    "Scheme": "kvbits.codecs",
    "Codec": "kvbits.codecs",
    "Policy": "kvbits.codecs",
    "load_model": "kvbits.models",
}

__all__ = [
    "LLM",
    "Codec",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "Policy",
    "RequestOutput",
    "SamplingParams",
    "Scheme",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import kvbits`` stays quick and without side effects."""
    if name not in _HOME:
        raise AttributeError(f"module 'kvbits' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
