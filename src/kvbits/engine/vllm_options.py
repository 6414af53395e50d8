"""Options of vLLM's ``LLM`` that kvbits has no use for: fine where they ask for nothing, else refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvbits.errors import ConfigError

_ANY = object()
_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((1,), "a model runs on one device; 'kvbits serve --ray' runs replicas of it"),
    "pipeline_parallel_size": ((1,), "a model runs on one device; 'kvbits serve --ray' runs replicas of it"),
    "gpu_memory_utilization": ((), "say how large the cache is: kv_cache_memory='8GiB'"),
    "kv_cache_memory_bytes": ((None,), "the name is kv_cache_memory"),
    "mamba_ssm_cache_dtype": (("auto", None), "the name is state_dtype"),
    "mamba_cache_dtype": (
        ("auto", None),
        "state_dtype is the dtype of recurrent states; convolutions keep the model's",
    ),
    "swap_space": ((0, None), "kv_offload_size='8GiB' keeps pages in host memory"),
    "cpu_offload_gb": ((0, None), "weights stay on one device; weights='int8' makes them smaller"),
    "quantization": ((None,), "weights='int8' stores the linear layers in 8 bits"),
    "seed": ((0, None), "give it to SamplingParams"),
    "block_size": ((64, None), "a page has 64 tokens"),
    "tokenizer": ((None,), "the model's own is used"),
    "tokenizer_mode": (("auto",), "the model's own is used"),
    "skip_tokenizer_init": ((False,), "prompts may be token ids all the same"),
    "revision": ((None,), "give the directory of a downloaded revision as the model"),
    "download_dir": ((None,), "the variable HF_HOME says where models are kept"),
    "load_format": (("auto", "safetensors", "gguf"), "files are recognised by themselves"),
    "task": (("auto", "generate"), "kvbits generates text"),
    "runner": (("auto", "generate"), "kvbits generates text"),
    "enable_chunked_prefill": ((True, None), "prompts are always computed in parts of max_num_batched_tokens"),
    "enforce_eager": ((_ANY,), ""),
    "disable_log_stats": ((_ANY,), ""),
    "disable_custom_all_reduce": ((_ANY,), ""),
}


def check_vllm_options(given: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` for an option of vLLM's that asks for something, with what to use instead, and
    ``TypeError`` for a name that neither has."""
    for name, value in given.items():
        if name not in _OPTIONS:
            raise TypeError(f"LLM() got an unexpected keyword argument '{name}'")
        harmless, instead = _OPTIONS[name]
        if _ANY not in harmless and value not in harmless:
            raise ConfigError(f"{name} is {value!r}, which kvbits does not do: {instead}")
