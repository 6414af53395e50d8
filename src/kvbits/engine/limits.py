"""Whether a prompt can be served at all. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbits.engine.params import SamplingParams
from kvbits.errors import ContextLengthError, RequestError


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
            raise RequestError(f"the prompt holds token {bad}, which is out of vocabulary: 0 to {self.vocab - 1}")

    def check_size(self, size: int, room: int = 0, at_least: bool = False) -> None:
        """Raise ``ContextLengthError`` unless ``size`` tokens, or ``at_least`` as many, and ``room`` more fit."""
        if size + room > min(self.context, self.pool):
            tokens = f"the prompt has at least {size} tokens" if at_least else f"the prompt has {size} tokens"
            self._too_long(f"{tokens} and leaves no room for the answer" if size <= self.context and room else tokens)

    def check_answer(self, prompt: int, max_tokens: int, param: str) -> None:
        """Raise ``ContextLengthError`` unless ``max_tokens`` may follow ``prompt`` tokens."""
        if prompt + max_tokens > min(self.context, self.pool):
            self._too_long(f"the prompt has {prompt} tokens and {param} asks for {max_tokens} more", param)

    def _too_long(self, found: str, param: str | None = None) -> None:
        # Clients look for these words, to ask another model or to cut the prompt.
        most = f"this model's maximum context length is {min(self.context, self.pool)} tokens"
        why = f" (the KV cache of {self.memory} bytes holds no more)" if self.pool < self.context else ""
        raise ContextLengthError(f"{most}{why}; {found}", param)

    def check_params(self, params: SamplingParams) -> None:
        """Raise ``RequestError`` for a token that the model does not have."""
        for name in ("logit_bias", "allowed_token_ids", "logprob_token_ids"):
            outside = next((t for t in getattr(params, name) or () if t >= self.vocab), None)
            if outside is not None:
                raise RequestError(f"{name} names token {outside}; the vocabulary has {self.vocab} tokens", name)
