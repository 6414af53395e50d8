"""Whether a prompt can be served at all. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbits.engine.params import SamplingParams
from kvbits.errors import RequestError


@dataclass(frozen=True)
class RequestLimits:
    """What one request may use: ``context`` tokens of the model, ``pool`` tokens of the cache of ``memory`` bytes."""

    vocab: int
    context: int
    pool: int
    memory: int

    def check_prompt(self, prompt: Sequence[int], room: int) -> None:
        """Raise ``RequestError`` unless ``prompt`` and ``room`` more tokens fit the model and the pool."""
        if not prompt:
            raise RequestError("the prompt has no tokens; at least one is needed")
        # What is too long is not looked at.
        self.check_size(len(prompt), room)
        if min(prompt) < 0 or max(prompt) >= self.vocab:
            bad = next(t for t in prompt if not 0 <= t < self.vocab)
            raise RequestError(f"the prompt holds token {bad}; the vocabulary is 0 to {self.vocab - 1}")

    def check_size(self, size: int, room: int = 0, at_least: bool = False) -> None:
        """Raise ``RequestError`` unless ``size`` tokens, or ``at_least`` as many, and ``room`` more fit."""
        tokens = f"at least {size}" if at_least else f"{size}"
        if size + room > self.context:
            rest = f" and must also hold {room} of the answer" if room else ""
            raise RequestError(f"the prompt has {tokens} tokens; the context is {self.context} tokens{rest}")
        if size + room > self.pool:
            raise RequestError(
                f"the prompt has {tokens} tokens; the KV cache of {self.memory} bytes holds at most {self.pool} tokens "
                "of one request"
            )

    def check_params(self, params: SamplingParams) -> None:
        """Raise ``RequestError`` for a token that the model does not have."""
        outside = [t for t in params.logit_bias if t >= self.vocab]
        if outside:
            raise RequestError(f"logit_bias names token {outside[0]}; the vocabulary is 0 to {self.vocab - 1}")
