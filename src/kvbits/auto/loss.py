"""What a KV cache dtype was measured to lose, and the lines that say so. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

OWN_TEXT = ""
"""The name of the text that the model wrote itself."""


@dataclass(frozen=True)
class Loss:
    """KL divergence to the 16-bit cache in nats a token: a mean with its 95 % interval over ``tokens`` scored ones.

    ``dtype`` is what :func:`identity` gives; ``text`` names the file; ``context`` is the length of a window in tokens,
    ``arithmetic`` that of the model's layers.
    """

    dtype: str
    kl: float
    low: float
    high: float
    tokens: int
    context: int
    text: str
    arithmetic: str

    def as_json(self) -> dict[str, Any]:
        """Plain types; a KL that is no number is ``None``."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Loss:
        """What :meth:`as_json` gave. Raises ``ValueError``, ``TypeError`` or ``KeyError`` for anything else."""
        kl, low, high = (math.inf if fields[name] is None else float(fields[name]) for name in ("kl", "low", "high"))
        tokens, context = int(fields["tokens"]), int(fields["context"])
        dtype, text, arithmetic = (fields[name] for name in ("dtype", "text", "arithmetic"))
        words = all(isinstance(word, str) for word in (dtype, text, arithmetic))
        if not (words and 0 <= low <= kl <= high and tokens > 0 and context > 0):
            raise ValueError(f"{dict(fields)} is no measured loss")
        return cls(dtype, kl, low, high, tokens, context, text, arithmetic)

    @property
    def where(self) -> str:
        """On what it was measured."""
        text = "that the model wrote" if self.text == OWN_TEXT else f"of {self.text}"
        return f"{self.tokens:,} tokens {text}"


def nats(value: float) -> str:
    """A KL for people: at least two digits of it."""
    return f"{value:.4f}" if value >= 0.001 else f"{value:.2g}"


def known_line(label: str, loss: Loss | None) -> str:
    """What a start with an explicit dtype says."""
    if loss is None:
        return (
            f"{label} was never measured on this model by this version of kvbits: --kv-cache-dtype auto measures a "
            "ladder of dtypes, 'kvbits evaluate' this one on your text"
        )
    if not loss.tokens or loss.kl == 0 == loss.high:
        return f"{label} on this model: KL 0, nothing is lost"
    return f"{label} on this model: KL {nats(loss.kl)}, measured on {loss.where}"
