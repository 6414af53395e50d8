"""In which formats and where a model may be loaded. No torch for the CPU."""

from __future__ import annotations

import re

from kvbits.config import MODEL_DTYPES, WEIGHT_FORMATS
from kvbits.errors import ConfigError, UnsupportedError


def check_formats(dtype: str, weights: str = "bf16", device: str = "cpu") -> None:
    """Raise ``ConfigError`` or ``UnsupportedError`` for formats and devices that no model can be loaded in."""
    if dtype not in MODEL_DTYPES:
        raise ConfigError(f"unknown model dtype '{dtype}'; choose from {', '.join(MODEL_DTYPES)}")
    if weights not in WEIGHT_FORMATS:
        raise ConfigError(f"unknown weights '{weights}'; choose from {', '.join(WEIGHT_FORMATS)}")
    if weights != "bf16" and dtype != "bfloat16":
        raise ConfigError(f"weights '{weights}' go with the model dtype bfloat16, not {dtype}")
    if not on_cpu(device):
        from kvbits.models.device import find_device

        find_device(device)
        if weights != "bf16":
            raise UnsupportedError(f"weights '{weights}' are multiplied on the CPU; the device is '{device}'")


def on_cpu(device: str) -> bool:
    """Whether a torch device's name is that of the CPU."""
    return re.fullmatch(r"cpu(:\d+)?", device) is not None
