"""Where a model runs."""

from __future__ import annotations

import torch

from kvbits.errors import ConfigError


def find_device(name: str) -> torch.device:
    """Raises ``ConfigError`` for a device that torch does not know or this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch tells of a missing driver by an assertion
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the device '{name}' cannot be used here: {reason}") from error
    return device
