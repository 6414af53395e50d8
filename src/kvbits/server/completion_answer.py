"""The answer of ``/v1/completions``: chunks of a stream, or one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvbits.engine.outputs import Delta
from kvbits.server.extras import Extras, prompt_logprobs
from kvbits.server.logprobs import CompletionLogprobs, TokenBytes, no_logprobs
from kvbits.server.usage import Usage


@dataclass(frozen=True)
class Wanted:
    """What a client wants to see: ``echo`` the prompt, ``logprobs`` (alternatives), ``generated`` text at all."""

    echo: bool
    logprobs: int | None
    generated: bool


@dataclass
class CompletionChoice:
    """One completion as it grows; ``prompt`` is its text and ``prompt_tokens`` its ids, for the echo."""

    index: int
    prompt: str
    prompt_tokens: list[int]
    wanted: Wanted
    grow: CompletionLogprobs
    extras: Extras
    text: str = ""
    logprobs: dict[str, list[Any]] = field(default_factory=no_logprobs)
    finish_reason: str | None = None
    started: bool = False
    token_ids: list[int] = field(default_factory=list)
    unsent_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[dict[str, Any] | None] | None = None

    def push(self, delta: Delta) -> tuple[str, dict[str, list[Any]] | None]:
        """Take in a delta; returns the text and the log-probabilities that it adds."""
        if self.wanted.generated:
            self.token_ids += delta.token_ids
            self.unsent_ids += delta.token_ids
        text = ""
        found: dict[str, list[Any]] = {}
        if not self.started and self.wanted.echo:
            text = self.prompt
            if delta.prompt_logprobs is not None and self.wanted.logprobs is not None:
                _join(found, self.grow.extend(self.prompt_tokens, delta.prompt_logprobs, self.prompt))
        self.started = True
        if self.wanted.generated:
            text += delta.text
            if delta.logprobs is not None and self.extras.reports(delta):
                _join(found, self.grow.extend(delta.token_ids, delta.logprobs))
        self.text += text
        _join(self.logprobs, found)
        self.finish_reason = delta.finish_reason if self.wanted.generated else delta.finish_reason and "length"
        return text, found or None


class CompletionAnswer:
    """All completions of all prompts; ``n`` of each. ``head`` is what every object begins with."""

    def __init__(
        self,
        head: dict[str, Any],
        prompts: list[tuple[str, list[int]]],
        n: int,
        wanted: Wanted,
        name: TokenBytes,
        extras: Extras = Extras(),  # noqa: B008
        hidden: Callable[[int], bool] = lambda token: False,
    ) -> None:
        self._head = {**head, "object": "text_completion"}
        self._n = n
        self._wanted = wanted
        self._extras = extras
        self._name = name
        self.usage = Usage([len(tokens) for _, tokens in prompts])
        self._choices = [
            CompletionChoice(
                p * n + i, text, tokens, wanted,
                CompletionLogprobs(wanted.logprobs or 0, name, hidden, extras.name_ids), extras,
            )
            for p, (text, tokens) in enumerate(prompts)
            for i in range(n)
        ]  # fmt: skip

    def push(self, prompt: int, delta: Delta) -> list[dict[str, Any]]:
        """Take in a delta of the ``prompt``-th prompt; returns the chunks of a stream that it makes."""
        choice = self._choices[prompt * self._n + delta.index]
        self.usage.add(prompt, delta, self._wanted.generated)
        first = not choice.started
        text, logprobs = choice.push(delta)
        if self._extras.prompt_logprobs and delta.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(delta.prompt_logprobs, self._name)
        if not text and logprobs is None and choice.finish_reason is None:
            choice.started = not first
            return []
        found = _choice(choice.index, text, logprobs, choice.finish_reason)
        if self._extras.token_ids:
            # What showed no text of its own goes with the next piece that does.
            found["token_ids"], choice.unsent_ids = choice.unsent_ids, []
            if first:
                found["prompt_token_ids"] = choice.prompt_tokens
        return [self._extras.chunk({**self._head, "choices": [found]}, self.usage, len(text))]

    def last(self) -> list[dict[str, Any]]:
        """The chunks after the last completion has ended."""
        return self._extras.last(self._head, self.usage)

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = [
            {
                **_choice(c.index, c.text, c.logprobs if self._wanted.logprobs is not None else None, c.finish_reason),
                "token_ids": c.token_ids if self._extras.token_ids else None,
                "prompt_token_ids": c.prompt_tokens if self._extras.token_ids else None,
                "prompt_logprobs": c.prompt_logprobs,
            }
            for c in self._choices
        ]
        return {**self._head, "choices": choices, "usage": self.usage.as_json()}

    @property
    def finish_reasons(self) -> list[str | None]:
        return [choice.finish_reason for choice in self._choices]


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _join(total: dict[str, list[Any]], more: dict[str, Any]) -> None:
    for name, values in more.items():
        total.setdefault(name, []).extend(values)
