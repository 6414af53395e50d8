"""Options of the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvbits.config import AUTO, check_state_dtype, parse_bytes
from kvbits.errors import ConfigError

if TYPE_CHECKING:
    from kvbits.codecs import Policy

STEP_TOKENS, GPU_STEP_TOKENS = 512, 2048
"""Token budgets of a step where none is asked for: a GPU needs more rows to be busy."""


def step_tokens(asked: int | None, device: str) -> int:
    """``max_num_batched_tokens`` as asked for, or the default of a torch ``device``."""
    if asked is not None:
        return asked
    return STEP_TOKENS if device.startswith("cpu") else GPU_STEP_TOKENS


@dataclass(frozen=True)
class EngineConfig:
    """Options of the engine; names are the ones that vLLM users know.

    ``kv_cache_dtype`` is a dtype, ``policy:DIR`` or a policy that was read already. ``kv_cache_memory`` is in bytes.
    ``max_num_batched_tokens`` is the token budget of one step (prefill chunks included). ``batch_invariant`` makes the
    engine refuse a model whose linear layers round by the number of rows, so that answers are the same to the last bit
    in any batch. ``kv_offload_size`` bytes keep the pages that the pool gives up: in host memory, or in
    ``kv_offload_path``, a file or a directory. ``state_dtype`` is what recurrent states are stored in between steps
    (:data:`kvbits.config.STATE_DTYPES`). ``disable_mla``: the model has to cache every head's keys and values where it
    could cache latents, as it is loaded with that option.
    """

    kv_cache_dtype: str | Policy = "int8"
    kv_cache_memory: int = 1 << 30
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = STEP_TOKENS
    enable_prefix_caching: bool = True
    batch_invariant: bool = False
    kv_offload_size: int | None = None
    kv_offload_path: str | None = None
    state_dtype: str = AUTO
    disable_mla: bool = False

    @classmethod
    def of(cls, **options: Any) -> EngineConfig:
        """The same, with sizes that may be text such as ``"256MiB"``. Raises ``ConfigError`` for what cannot be."""
        for name in ("kv_cache_memory", "kv_offload_size"):
            if options.get(name) is not None:
                options[name] = parse_bytes(options[name])
        return cls(**options)

    def __post_init__(self) -> None:
        check_state_dtype(self.state_dtype)
        for name in ("kv_cache_memory", "max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"{name} is {value}; it must be positive")
        if self.max_model_len is not None and self.max_model_len <= 0:
            raise ConfigError(f"max_model_len is {self.max_model_len}; it must be positive")
        if self.kv_offload_path is not None and self.kv_offload_size is None:
            raise ConfigError(f"kv_offload_path is '{self.kv_offload_path}'; it also needs kv_offload_size")
        if self.kv_offload_size is not None and not self.enable_prefix_caching:
            raise ConfigError("kv_offload_size keeps pages of the prefix cache, which enable_prefix_caching turns off")
