"""Attention on coded pages: the backend interface and its implementations."""

import logging
from collections.abc import Sequence

from kvbits.codecs import Scheme
from kvbits.config import LayerGeometry
from kvbits.errors import ConfigError, UnsupportedError
from kvbits.kernels.base import SPLIT_PAGES, Backend, BatchLayout
from kvbits.pages import SequencePages

__all__ = [
    "BACKENDS",
    "GPUS",
    "SPLIT_PAGES",
    "Backend",
    "BatchLayout",
    "SequencePages",
    "choose_backend",
    "default_backend",
    "kernels_line",
]

log = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "cuda", "triton")
"""Names that :func:`choose_backend` takes."""

GPUS = ("cuda", "xpu")
"""Devices of torch that Triton compiles for; AMD's are named "cuda" too."""


def default_backend(device: str = "cpu") -> Backend:
    """The fastest backend for models on ``device`` (torch's name of it), a new instance for each engine."""
    return choose_backend("auto", device)


def choose_backend(choice: Backend | str | None, device: str = "cpu") -> Backend:
    """``choice`` itself where it is a backend, else the one of that name; ``None`` is ``"auto"``, by the device.

    Raises ``ConfigError`` for an unknown name or one that does not go with ``device``, ``UnsupportedError`` for a
    device that there are no kernels for.
    """
    if isinstance(choice, Backend):
        return choice
    name, kind = choice or "auto", device.partition(":")[0]
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend '{name}'; choose from {', '.join(BACKENDS)}")
    if name == "auto":
        if kind != "cpu" and kind not in GPUS:
            raise UnsupportedError(f"the model is on '{device}'; kvbits has kernels for cpu, {', '.join(GPUS)}")
        name = "cpu" if kind == "cpu" else _of_gpu(device)
    # Not at the top: importing kvbits must load neither the native library nor Triton.
    if name == "cpu":
        if kind != "cpu":
            raise ConfigError(f"the backend 'cpu' reads host memory; the model is on '{device}'")
        from kvbits.kernels.cpu import CpuBackend

        return CpuBackend()
    try:
        from kvbits.kernels.cuda.backend import CudaBackend
        from kvbits.kernels.triton.backend import TritonBackend
    except ImportError as error:
        raise ConfigError(f"the backend '{name}' needs Triton: pip install 'kvbits[gpu]' ({error})") from error
    return TritonBackend(device) if name == "triton" else CudaBackend(device, only=choice == "cuda")


def _of_gpu(device: str) -> str:
    import torch

    from kvbits.kernels.cuda.driver import refusal

    reason = refusal(torch.device(device))
    if reason is not None:
        log.info("Triton's kernels decode: there are CUDA kernels too, but %s", reason)
    return "cuda" if reason is None else "triton"


def kernels_line(backend: Backend, schemes: Sequence[Scheme], layers: Sequence[LayerGeometry]) -> str:
    """Whose kernels decode, such as ``"cuda"``; by layers where they differ."""
    names: dict[str, list[int]] = {}
    for index, (scheme, layer) in enumerate(zip(schemes, layers, strict=True)):
        names.setdefault(backend.kernels(scheme, layer), []).append(index)
    if len(names) == 1:
        return next(iter(names))
    return ", ".join(f"{name} for {len(found)} of {len(layers)} layers" for name, found in names.items())
