"""What a user asks of the KV cache dtype, checked before anything slow is done. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvbits.config import AUTO, is_auto
from kvbits.errors import ConfigError
from kvbits.evaluation.verdict import LIMITS
from kvbits.evaluation.windows import read_text

if TYPE_CHECKING:
    from kvbits.codecs import Policy

BOUND = LIMITS["kl"].none
"""The largest KL, in nats a token, that ``auto`` accepts unless it is told: what the verdict calls no loss."""

MOST = LIMITS["kl"].bad
"""The largest bound: what loses more, the verdict calls not fit for use."""


@dataclass(frozen=True)
class Wanted:
    """A dtype, or ``"auto"`` with ``max_kl`` (default :data:`BOUND`) and a UTF-8 ``text`` to measure on (default: the
    model writes one).

    Raises ``ConfigError`` for a bound that is out of range, a text that cannot be read, and for either with a dtype
    that is named.
    """

    dtype: str | Policy
    max_kl: float | None = None
    text: str | Path | None = None
    content: str | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        for name, value in (("max-kl", self.max_kl), ("text", self.text)):
            if value is not None and not self.auto:
                shown = self.dtype if isinstance(self.dtype, str) else self.dtype.label
                raise ConfigError(f"--{name} is for --kv-cache-dtype {AUTO}, which chooses; '{shown}' was named")
        if self.max_kl is not None and not 0 < self.max_kl <= MOST:
            raise ConfigError(
                f"--max-kl is {self.max_kl:g}; it must be over 0 and at most {MOST:g} nats a token, over which a "
                "dtype is not fit for use"
            )
        if self.text is not None:
            object.__setattr__(self, "content", read_text(Path(self.text)))

    @property
    def auto(self) -> bool:
        """Whether the dtype is to be chosen."""
        return is_auto(self.dtype)

    @property
    def bound(self) -> float:
        """Nats a token."""
        return BOUND if self.max_kl is None else self.max_kl
