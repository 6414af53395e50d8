"""What a caller gets back; the names are vLLM's. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Natural log of a token's probability under the model, and its rank (1: the likeliest)."""

    logprob: float
    rank: int


Logprobs = dict[int, Logprob]
"""The chosen token and the likeliest alternatives at one position, by token id."""


@dataclass(frozen=True)
class Delta:
    """What one step added to one sequence.

    ``text`` may be empty (part of a character, or of a stop string, is held back); all texts of a sequence joined are
    its final text. ``finish_reason`` is set on the last delta. ``index`` tells the ``n`` sequences of a request apart.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    note: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None


@dataclass
class CompletionOutput:
    """One generated sequence.

    ``finish_reason``: ``stop`` (end token, stop token or stop string, which ``stop_reason`` names), ``length`` (with a
    ``note`` where it was not ``max_tokens`` that ended it), ``abort`` or ``error``.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    note: str | None = None

    def add(self, delta: Delta) -> None:
        """Append what a step brought."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *delta.logprobs]
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.note = delta.note


@dataclass
class RequestOutput:
    """A prompt and the ``n`` sequences generated for it; ``error`` says why it could not be served."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[Logprobs | None] | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self.outputs)

    def add(self, delta: Delta) -> None:
        """Append what a step brought to one of the sequences."""
        self.outputs[delta.index].add(delta)
        if delta.index == 0:
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        if delta.error is not None:
            self.error = delta.error
