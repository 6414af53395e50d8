"""What a calibration is asked for. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvbits.config import PAGE_TOKENS
from kvbits.errors import ConfigError


@dataclass(frozen=True)
class Goal:
    """What a policy must meet: exactly one of ``bits`` per element of sealed pages, ``max_kl`` in nats a token as
    measured, and ``memory``, the bytes in which ``sessions`` of ``session_tokens`` tokens fit."""

    bits: float | None = None
    max_kl: float | None = None
    memory: int | None = None
    sessions: int = 1
    session_tokens: int = 4096

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.bits, self.max_kl, self.memory)) != 1:
            raise ConfigError("give exactly one of --bits, --max-kl and --kv-cache-memory")
        for name in ("bits", "max_kl"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be positive")
        if self.bits is not None and self.bits > 16:
            raise ConfigError(f"--bits is {self.bits:g}; the model's own cache has 16")


@dataclass(frozen=True)
class Sizes:
    """Windows of ``context`` tokens: ``windows`` to calibrate on, ``check_windows`` others to measure the result on."""

    context: int = 2048
    windows: int = 8
    check_windows: int = 2

    def __post_init__(self) -> None:
        check_context(self.context)


def check_context(context: int) -> None:
    """Raise ``ConfigError`` for windows of fewer than three pages, which hold too few sealed pages to learn from."""
    if context < 3 * PAGE_TOKENS:
        raise ConfigError(
            f"calibration windows of {context} tokens are too short; at least {3 * PAGE_TOKENS} are needed"
        )
