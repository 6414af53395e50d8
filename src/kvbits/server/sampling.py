"""From a request's fields to the engine's parameters.

A field left out has the value of the model's generation configuration, or else OpenAI's default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import Any

from kvbits.engine.grammar import Grammar
from kvbits.engine.params import SamplingParams
from kvbits.errors import RequestError
from kvbits.server.protocol.base import SamplingFields
from kvbits.server.protocol.limits import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKENS,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKENS,
    MAX_STOPS,
)

_SAME_NAME = (
    "n", "seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "include_stop_str_in_output",
    "skip_special_tokens", "bad_words", "allowed_token_ids", "logprob_token_ids",
)  # fmt: skip


_NAMED = 8
"""Wrong keys that a message names."""


def sampling_params(
    request: SamplingFields,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    visible_tokens: Sequence[int] = (),
    defaults: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """The engine's parameters, with what they need prepared; ``defaults`` are the model's.

    Raises ``RequestError`` for a value out of range, naming the field and its limit.
    """
    given: dict[str, Any] = {name: getattr(request, name) for name in _SAME_NAME}
    if (request.n or 1) > MAX_CHOICES:
        raise RequestError(f"n is {request.n}; at most {MAX_CHOICES} are possible", "n")
    _at_most("stop_token_ids", request.stop_token_ids, MAX_STOP_TOKENS, "tokens")
    _at_most("logit_bias", request.logit_bias, MAX_LOGIT_BIAS, "tokens")
    _at_most("logprob_token_ids", request.logprob_token_ids, MAX_LOGPROB_TOKENS, "tokens")
    _short("bad_words", request.bad_words or (), MAX_BAD_WORDS)
    stop = (request.stop,) if isinstance(request.stop, str) else request.stop or ()
    _short("stop", stop, MAX_STOPS)
    wanted = [count for count in (prompt_logprobs, request.prompt_logprobs) if count is not None]
    return SamplingParams.of(
        defaults or {},
        max_tokens,
        stop=stop,
        logprobs=logprobs,
        prompt_logprobs=max(wanted, default=None),
        logit_bias=_bias(request.logit_bias or {}),
        grammar=grammar,
        visible_tokens=visible_tokens,
        **given,
    ).prepare()


def _short(name: str, texts: Sequence[str], most: int) -> None:
    _at_most(name, texts, most, "strings")
    longest = max((len(text) for text in texts), default=0)
    if longest > MAX_STOP_LENGTH:
        raise RequestError(
            f"{name} holds a string of {longest} characters; at most {MAX_STOP_LENGTH} are possible", name
        )


def _at_most(name: str, values: Sized | None, most: int, what: str) -> None:
    if values is not None and len(values) > most:
        raise RequestError(f"{name} holds {len(values)} {what}; at most {most} are possible", name)


def _bias(bias: dict[str, float]) -> dict[int, float]:
    wrong = [key for key in bias if not (key.isascii() and key.isdigit() and len(key) < 12)]
    if wrong:
        named = ", ".join(repr(key[:40]) for key in wrong[:_NAMED]) + (" ..." if len(wrong) > _NAMED else "")
        raise RequestError(f"logit_bias names {named}; each key must be a token id", "logit_bias")
    return {int(key): value for key, value in bias.items()}
