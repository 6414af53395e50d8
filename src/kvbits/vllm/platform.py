"""vLLM's platform, made to answer for kvbits' dtypes; whatever else is asked of it, it answers as before.

vLLM resolves its platform once for each process, and modules keep the one instance. It becomes an instance of a
subclass of its own class (``CpuPlatform``, ``NvmlCudaPlatform``), so no other engine's choice is captured and
no function is replaced. A platform plug-in would not do: an explicit ``VLLM_TARGET_DEVICE=cpu`` asks none.
"""

from __future__ import annotations

from typing import Any, ClassVar

from kvbits.config import PAGE_TOKENS
from kvbits.errors import UnsupportedError
from kvbits.vllm.checks import check_engine
from kvbits.vllm.options import Names, policy_asked

BACKEND = "kvbits.vllm.backend.KvbitsBackend"


class _Serving:
    """What the subclass does differently; its other base is the platform's class."""

    kvbits_names: ClassVar[Names]

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if attn_selector_config.kv_cache_dtype not in cls.kvbits_names:
            found: str = super().get_attn_backend_cls(  # type: ignore[misc]
                selected_backend, attn_selector_config=attn_selector_config, num_heads=num_heads
            )
            return found
        from kvbits.vllm.backend import KvbitsBackend

        reasons = KvbitsBackend.validate_configuration(
            device_capability=cls.get_device_capability(),  # type: ignore[attr-defined]
            **attn_selector_config._asdict(),
        )
        if reasons:
            raise UnsupportedError(f"kvbits' cache in vLLM cannot serve this model: {'; '.join(reasons)}")
        return BACKEND

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        cache, names = vllm_config.cache_config, cls.kvbits_names
        policy = policy_asked(cache.cache_dtype, vllm_config.additional_config, names)
        if policy is not None:
            if not names.carrier:
                raise UnsupportedError(f"kvbits' cache in vLLM ('{policy}') needs vLLM 0.33 or later on a GPU")
            check_engine(vllm_config, policy)
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        if policy is not None:
            cache.block_size = PAGE_TOKENS
            if cache.cache_dtype == "auto":
                cache.cache_dtype = names.carrier


def serve_on(platform: Any, names: Names) -> None:
    """Let ``platform`` (vLLM's current one) answer for ``names`` too."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    own = type(platform)
    if not issubclass(own, _Serving):
        platform.__class__ = type(own.__name__, (_Serving, own), {"kvbits_names": names, "__module__": own.__module__})
