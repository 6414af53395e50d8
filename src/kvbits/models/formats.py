"""In which formats and where a model may be loaded. No torch for the CPU."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from kvbits.config import MODEL_DTYPES, WEIGHT_FORMATS
from kvbits.errors import ConfigError, UnsupportedError

_KINDS = ("cuda", "hip", "meta", "mps", "privateuseone", "vulkan", "xla", "xpu")
"""Devices that torch may know; whether there are kernels for one is said by the kernels."""


def check_formats(dtype: str, weights: str = "auto", device: str = "cpu") -> None:
    """Raise ``ConfigError`` or ``UnsupportedError`` for formats and devices that no model can be loaded in."""
    if dtype not in MODEL_DTYPES:
        raise ConfigError(f"unknown model dtype '{dtype}'; choose from {', '.join(MODEL_DTYPES)}")
    if weights not in WEIGHT_FORMATS:
        raise ConfigError(f"unknown weights '{weights}'; choose from {', '.join(WEIGHT_FORMATS)}")
    if not on_cpu(device):
        _check_gpu(device)
        from kvbits.kernels import default_backend
        from kvbits.models.device import find_device

        default_backend(str(find_device(device)))  # one without kernels is refused
        if weights not in ("auto", "bf16"):
            raise UnsupportedError(f"weights '{weights}' are multiplied on the CPU; the device is '{device}'")


def _check_gpu(device: str) -> None:
    """Raise ``ConfigError`` for what torch need not be loaded to refuse: no device of its, or one not built into it."""
    kind = device.partition(":")[0]
    found = find_spec("torch")
    built = Path(*(found.submodule_search_locations or ()), "version.py") if found is not None else None
    if built is None or not built.is_file():
        return
    says = dict(re.findall(r"^(\w+).*= (.*)$", built.read_text("utf-8"), re.MULTILINE))
    if kind == "cuda" and says.get("cuda") == says.get("hip") == "None":
        why = f"this torch ({says.get('__version__', '')}) is built for the CPU; install one for the GPU"
        raise ConfigError(f"the device '{device}' cannot be used here: {why}")
    if kind not in _KINDS:
        raise ConfigError(f"the device '{device}' cannot be used here: it is neither cpu nor one such as cuda")


def on_cpu(device: str) -> bool:
    """Whether a torch device's name is that of the CPU."""
    return re.fullmatch(r"cpu(:\d+)?", device) is not None
