"""Attention on coded pages: the backend interface and its implementations."""

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
]

BACKENDS = ("auto", "cpu", "triton")
"""Names that :func:`choose_backend` takes."""

GPUS = ("cuda", "xpu")
"""Devices of torch that Triton compiles for; AMD's are named "cuda" too."""


def default_backend(device: str = "cpu") -> Backend:
    """The fastest backend for models on ``device`` (torch's type of it), a new instance for each engine."""
    return choose_backend("auto", device)


def choose_backend(choice: Backend | str | None, device: str = "cpu") -> Backend:
    """``choice`` itself where it is a backend, else the one of that name; ``None`` is ``"auto"``, by the device.

    Raises ``ConfigError`` for an unknown name or one that does not go with ``device``, ``UnsupportedError`` for a
    device that there are no kernels for.
    """
    if isinstance(choice, Backend):
        return choice
    name = choice or "auto"
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend '{name}'; choose from {', '.join(BACKENDS)}")
    if name == "auto":
        if device != "cpu" and device not in GPUS:
            raise UnsupportedError(f"the model is on '{device}'; kvbits has kernels for cpu, {', '.join(GPUS)}")
        name = "cpu" if device == "cpu" else "triton"
    # Not at the top: importing kvbits must load neither the native library nor Triton.
    if name == "cpu":
        if device != "cpu":
            raise ConfigError(f"the backend 'cpu' reads host memory; the model is on '{device}'")
        from kvbits.kernels.cpu import CpuBackend

        return CpuBackend()
    try:
        from kvbits.kernels.triton.backend import TritonBackend
    except ImportError as error:
        raise ConfigError(f"the backend 'triton' needs Triton: pip install 'kvbits[gpu]' ({error})") from error
    return TritonBackend(device)
