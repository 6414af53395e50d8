"""Which of several GPUs a thread's launches go to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the current one of its kind inside, where it is a GPU: kernels, streams and graphs go to it."""
    if device.type in ("cpu", "meta"):
        return nullcontext()
    found: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
    return found
