"""kvbits' cache inside stock vLLM: an attention backend that vLLM finds through an entry point.

Nothing here is imported by the rest of kvbits, and this module imports vLLM only when vLLM itself calls
:func:`register`. docs/vllm.md says how it is used, and what was measured.
"""

from __future__ import annotations


def register() -> None:
    """Entry point ``vllm.general_plugins``: called in vLLM's front end, its engine and every worker; again is harmless.

    Where kvbits has no kernels for vLLM's device, or vLLM is too old, nothing is registered, so that the dtypes' names
    are refused there, and vLLM's own caches work as ever.
    """
    from vllm.platforms import current_platform

    from kvbits.kernels import GPUS

    if current_platform.device_type not in ("cpu", *GPUS):
        return
    from kvbits.vllm.names import interfaces_are_there, register_names
    from kvbits.vllm.platform import serve_on

    if not interfaces_are_there():
        return
    serve_on(current_platform, register_names(current_platform.is_cpu()))
