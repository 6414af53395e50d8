"""kvbits: serve long-context language models from a quantized key/value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbits.lazy import lazily

if TYPE_CHECKING:
    from kvbits.async_llm import AsyncLLM
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
    "AsyncLLM": "kvbits.async_llm",
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
    "AsyncLLM",
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


__getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
