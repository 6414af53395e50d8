"""Options of speculative decoding, under vLLM's names. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvbits.config import PAGE_TOKENS, parse_bytes
from kvbits.errors import ConfigError

METHODS = ("ngram", "draft_model", "self")


@dataclass(frozen=True)
class SpeculativeConfig:
    """How tokens are guessed.

    ``method``: ``ngram`` (the text after an earlier occurrence of the last tokens), ``draft_model`` (a smaller
    ``model``, with a cache of its own of ``kv_cache_memory`` bytes in ``kv_cache_dtype``) or ``self`` (the model
    itself, which reads half of each sealed page of its ``int8h`` cache). At most ``num_speculative_tokens`` are guessed
    a step. ``prompt_lookup_min`` to ``prompt_lookup_max`` tokens must match.
    ``adaptive``: guess fewer tokens, or none, where that is measured to be faster.

    Raises ``ConfigError`` for a value that cannot work, naming it.
    """

    method: str = "ngram"
    num_speculative_tokens: int = 8
    prompt_lookup_max: int = 4
    prompt_lookup_min: int = 2
    model: str | None = None
    kv_cache_dtype: str = "int8"
    kv_cache_memory: str | int = "256MiB"
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"unknown speculative method '{self.method}'; choose from {', '.join(METHODS)}")
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < PAGE_TOKENS:
                raise ConfigError(f"{name} is {value!r}; it must be an integer from 1 to {PAGE_TOKENS - 1}")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min is {self.prompt_lookup_min}; it must not be over prompt_lookup_max, "
                f"{self.prompt_lookup_max}"
            )
        if self.method == "draft_model" and not (isinstance(self.model, str) and self.model):
            raise ConfigError("the speculative method 'draft_model' needs a model: its name, directory or file")
        if self.method != "draft_model" and self.model is not None:
            raise ConfigError(f"the speculative method '{self.method}' takes no model; '{self.model}' is given")
        if not isinstance(self.kv_cache_dtype, str):
            raise ConfigError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; it must be a string")
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"adaptive is {self.adaptive!r}; it must be true or false")
        parse_bytes(self.kv_cache_memory)

    @property
    def memory_bytes(self) -> int:
        """``kv_cache_memory`` in bytes."""
        return parse_bytes(self.kv_cache_memory)

    @classmethod
    def of(cls, source: SpeculativeConfig | Mapping[str, Any] | str | None) -> SpeculativeConfig | None:
        """From a mapping, JSON text or the name of a method; ``None`` stays ``None``.

        Raises ``ConfigError`` for an unknown option.
        """
        if source is None or isinstance(source, SpeculativeConfig):
            return source
        if isinstance(source, str) and source in METHODS:
            return cls(method=source)
        if isinstance(source, str) and not source.lstrip().startswith("{"):
            raise ConfigError(
                f"unknown speculative method '{source}'; choose from {', '.join(METHODS)}, or give options as JSON"
            )
        if isinstance(source, str):
            try:
                source = json.loads(source)
            except json.JSONDecodeError as error:
                raise ConfigError(f"the speculative config '{source}' is no JSON: {error}") from error
        if not isinstance(source, Mapping):
            raise ConfigError(f"the speculative config is {source!r}; it must be a JSON object")
        known = [f.name for f in fields(cls)]
        for name in source:
            if name not in known:
                raise ConfigError(f"the speculative config has no option '{name}'; choose from {', '.join(known)}")
        return cls(**source)
