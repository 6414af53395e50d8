"""From a request's fields to the engine's parameters.

A field left out has the value of the model's generation configuration, or else OpenAI's default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from kvbits.engine.grammar import Grammar
from kvbits.engine.params import SamplingParams
from kvbits.errors import RequestError
from kvbits.server.protocol.base import SamplingFields
from kvbits.server.protocol.limits import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_STOPS

_SAME_NAME = (
    "n", "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop_token_ids", "ignore_eos",
)  # fmt: skip


def sampling_params(
    request: SamplingFields,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """The engine's parameters, with what they need prepared; ``defaults`` are the model's.

    Raises ``RequestError`` for a value out of range, naming the field and its limit.
    """
    given: dict[str, Any] = {name: getattr(request, name) for name in _SAME_NAME}
    if (request.n or 1) > MAX_CHOICES:
        raise RequestError(f"n is {request.n}; at most {MAX_CHOICES} are possible")
    _at_most("stop_token_ids", request.stop_token_ids, MAX_STOP_TOKENS, "tokens")
    _at_most("logit_bias", request.logit_bias, MAX_LOGIT_BIAS, "tokens")
    return SamplingParams.of(
        defaults or {},
        max_tokens,
        stop=_stops(request.stop),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        logit_bias=_bias(request.logit_bias or {}),
        grammar=grammar,
        **given,
    ).prepare()


def _stops(stop: str | list[str] | None) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    _at_most("stop", stops, MAX_STOPS, "strings")
    longest = max((len(text) for text in stops), default=0)
    if longest > MAX_STOP_LENGTH:
        raise RequestError(f"stop holds a string of {longest} characters; at most {MAX_STOP_LENGTH} are possible")
    return stops


def _at_most(name: str, values: Sized | None, most: int, what: str) -> None:
    if values is not None and len(values) > most:
        raise RequestError(f"{name} holds {len(values)} {what}; at most {most} are possible")


def _bias(bias: dict[str, float]) -> dict[int, float]:
    found = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise RequestError(f"logit_bias names {key[:40]!r}; each key must be a token id")
        found[int(key)] = value
    return found
