"""From a request's fields to the engine's parameters. A field left out has OpenAI's default."""

from __future__ import annotations

from typing import Any

from kvbits.engine.grammar import Grammar
from kvbits.engine.params import SamplingParams
from kvbits.errors import RequestError
from kvbits.server.protocol.base import SamplingFields

_SAME_NAME = (
    "n", "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop_token_ids", "ignore_eos",
)  # fmt: skip
MAX_STOPS = 16
"""Most stop strings of a request; every token is searched for each."""

MAX_STOP_LENGTH = 4096
"""Longest stop string, in characters."""


def sampling_params(
    request: SamplingFields,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """The engine's parameters. Raises ``RequestError`` for a value out of range, naming the field."""
    given: dict[str, Any] = {name: getattr(request, name) for name in _SAME_NAME}
    return SamplingParams(
        max_tokens=max_tokens,
        stop=_stops(request.stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_bias(request.logit_bias or {}),
        grammar=grammar,
        **{name: value for name, value in given.items() if value is not None},
    )


def _stops(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop holds {len(stops)} strings; at most {MAX_STOPS} are possible")
    longest = max((len(text) for text in stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise RequestError(f"stop holds a string of {longest} characters; at most {MAX_STOP_LENGTH} are possible")
    return stops


def _bias(bias: dict[str, float]) -> dict[int, float]:
    found = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise RequestError(f"logit_bias names {key[:40]!r}; each key must be a token id")
        found[int(key)] = value
    return found
