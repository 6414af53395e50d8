"""Names under which vLLM's ``--kv-cache-dtype`` knows kvbits' dtypes. All that differs between its versions is here.

From 0.33 on vLLM lets a package register names. 0.32 has a closed list: two of its own names that its CPU backend does
not serve stand for the nearest dtypes, and every other policy comes through ``--additional-config``. No function of
vLLM is replaced for either.
"""

from __future__ import annotations

import logging
from typing import Any

from kvbits.codecs import SCHEMES
from kvbits.vllm.options import PREFIX, Names

log = logging.getLogger(__name__)

_OF_0_32 = {"int8_per_token_head": "int8", "int4_per_token_head": "int4"}


def interfaces_are_there() -> bool:
    """Whether this vLLM has what the plug-in is made of; an older one runs as if kvbits were not installed."""
    try:
        from vllm.v1.attention.backends.registry import register_backend  # noqa: F401
        from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheLayout  # noqa: F401
    except ImportError as error:
        log.warning("kvbits' cache needs vLLM 0.32 or later, and is not offered here: %s", error)
        return False
    return True


def register_names(on_cpu: bool) -> Names:
    """Make the names known to this process's vLLM; none where it serves its own list itself, as 0.32 does on GPUs."""
    try:
        from vllm.config.cache import KV_CACHE_DTYPES, register_kv_cache_dtype
    except ImportError:
        return Names(dict(_OF_0_32), carrier="int8_per_token_head") if on_cpu else Names({}, carrier="")
    names = Names({f"{PREFIX}_{name}": name for name in SCHEMES}, carrier=PREFIX)
    for name in (names.carrier, *names.dtypes):
        if name not in KV_CACHE_DTYPES:
            register_kv_cache_dtype(name)(_handler(name))
    return names


def _handler(name: str) -> type[Any]:
    import torch
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            # KVQuantMode.CUSTOM has the number of another mode in 0.33, whose code paths it would take.
            return KVQuantMode.NONE

    Handler.name = name  # type: ignore[attr-defined]
    return Handler
