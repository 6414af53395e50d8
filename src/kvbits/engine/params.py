"""How one request wants its tokens chosen, under the names that vLLM and OpenAI use. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvbits.engine.stops import StopAutomaton
from kvbits.errors import RequestError

if TYPE_CHECKING:
    from kvbits.engine.grammar import Grammar

MAX_LOGPROBS = 64
"""Most alternatives that a request may ask for at each token."""


GREEDY_BELOW = 1e-5
"""A temperature below this is greedy, as in vLLM: float32 cannot divide by much less."""

LEAST_REPETITION_PENALTY = 0.001
"""A logit divided by less may leave float32's range."""


@dataclass(frozen=True)
class SamplingParams:
    """Frozen sampling options of one request.

    ``max_tokens=None`` means: until the model's context is full. ``temperature=0`` is greedy (as is
    all below :data:`GREEDY_BELOW`). ``top_k`` of 0 or -1
    keeps all tokens. ``seed=None`` draws a fresh seed. ``stop`` strings end the text and are not part of it;
    ``stop_token_ids`` end it like the model's own end token. ``logprobs=k`` reports the chosen token and the ``k``
    likeliest ones, of the model's raw distribution, or, with ``logprob_token_ids``, the chosen one and these;
    ``prompt_logprobs`` the same for each prompt token, of the likeliest. The penalties
    and ``logit_bias`` are those of OpenAI (``repetition_penalty``: Keskar et al. 2019, over prompt and output). A
    ``grammar`` (:class:`kvbits.engine.grammar.GrammarCompiler`) bounds what may be said; the answer ends where it does.
    Before ``min_tokens`` tokens no end token and no stop ends it (a grammar may). ``include_stop_str_in_output`` keeps
    the stop string that ended the text, ``skip_special_tokens=False`` shows special tokens in it (``visible_tokens``:
    these alone), ``allowed_token_ids`` are the only tokens that may come, and none of ``bad_words`` (as the model's
    tokenizer writes them, behind a space or not) does.

    Raises ``RequestError`` for a value out of range, naming the field.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    logprob_token_ids: Sequence[int] = ()
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    visible_tokens: Sequence[int] = ()
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    bans: tuple[tuple[int, ...], ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        self._lists()
        self._integers()
        self._numbers()
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be true or false", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must not exceed max_tokens, {self.max_tokens}", "min_tokens"
            )
        for key, bias in self.logit_bias.items():
            _number(f"logit_bias[{key}]", bias, -100.0, 100.0)

    @classmethod
    def of(cls, defaults: Mapping[str, Any], max_tokens: int | None, **given: Any) -> SamplingParams:
        """``given`` without what is ``None``, then ``defaults``, those of a model
        (:attr:`kvbits.models.LoadedModel.sampling_defaults`), then the fields' own."""
        asked = {name: value for name, value in given.items() if value is not None}
        return cls(max_tokens=max_tokens, **{**defaults, **asked})

    @cached_property
    def stops(self) -> StopAutomaton:
        """The automaton of the stop strings."""
        return StopAutomaton(self.stop_strings)

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """``stop_token_ids`` as a set."""
        return frozenset(self.stop_token_ids)

    @cached_property
    def bias(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """``logit_bias`` as token ids and what is added to each."""
        count = len(self.logit_bias)
        return (
            np.fromiter(self.logit_bias, dtype=np.int64, count=count),
            np.fromiter(self.logit_bias.values(), dtype=np.float32, count=count),
        )

    @cached_property
    def allowed(self) -> NDArray[np.int64] | None:
        """``allowed_token_ids`` as an array."""
        return None if self.allowed_token_ids is None else np.array(self.allowed_token_ids, dtype=np.int64)

    def prepare(self) -> SamplingParams:
        """Build now what the engine would build when the request comes; returns itself."""
        for name in ("stops", "stop_tokens", "bias", "allowed"):
            getattr(self, name)
        return self

    def find_bans(self, encode: Callable[[str], list[int]]) -> SamplingParams:
        """Write ``bad_words`` as token ids, by ``encode``, which adds no special tokens; returns itself.

        A word is banned as it stands and behind a space, where the space is part of its first token.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in () if self.bans else self.bad_words:
            plain, spaced = encode(word.lstrip(" ")), encode(f" {word.lstrip(' ')}")
            found[tuple(plain)] = None
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                found[tuple(spaced)] = None
        if found:
            object.__setattr__(self, "bans", tuple(ids for ids in found if ids))
        return self

    def with_seed(self, seed: int) -> SamplingParams:
        """The same with another seed, and with all that is prepared."""
        found = copy(self)
        object.__setattr__(found, "seed", seed)
        found._integers()
        return found

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as it is stored: a tuple."""
        return tuple(self.stop or ())

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the distribution."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @property
    def plain_greedy(self) -> bool:
        """Whether the arg max of the raw logits is all that is asked for."""
        return self.greedy and self.unchanged and self.logprobs is None

    @property
    def unchanged(self) -> bool:
        """Whether the model's logits are used as they are."""
        bounded = self.grammar is not None or self.allowed_token_ids is not None or self.bad_words or self.min_tokens
        return not (self.penalised or self.logit_bias or bounded)

    def _lists(self) -> None:
        """Store what is a list as a tuple, after a look at what it holds."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, values in (("stop", stop), ("bad_words", self.bad_words)):
            found = _items(name, values)
            for text in found:
                if not isinstance(text, str) or not text:
                    raise RequestError(f"{name} holds {text!r}; each must be a string of at least one character", name)
            object.__setattr__(self, name, found)
        for name in ("stop_token_ids", "visible_tokens", "allowed_token_ids", "logprob_token_ids"):
            given = getattr(self, name)
            found = _items(name, given)
            for token in found:
                if not _is_int(token) or token < 0:
                    raise RequestError(f"{name} holds {token!r}; each must be a token id", name)
            object.__setattr__(self, name, None if given is None and name == "allowed_token_ids" else found)
        if self.allowed_token_ids == ():
            raise RequestError("allowed_token_ids is empty; at least one token must be allowed", "allowed_token_ids")
        if not isinstance(self.logit_bias or {}, Mapping):
            raise RequestError(f"logit_bias is {self.logit_bias!r}; it must map token ids to numbers", "logit_bias")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        for key in self.logit_bias:
            if not _is_int(key) or key < 0:
                raise RequestError(f"logit_bias names {key!r}; each key must be a token id", "logit_bias")

    def _integers(self) -> None:
        bounds: dict[str, tuple[int, int | None, bool]] = {
            "max_tokens": (1, None, True),
            "min_tokens": (0, None, False),
            "top_k": (-1, None, False),
            "n": (1, 128, False),
            "logprobs": (0, MAX_LOGPROBS, True),
            "prompt_logprobs": (0, MAX_LOGPROBS, True),
            "seed": (-(2**63), 2**64 - 1, True),
        }
        for name, (low, high, optional) in bounds.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            if not _is_int(value) or value < low or (high is not None and value > high):
                limit = f"from {low} to {high}" if high is not None else f"of at least {low}"
                raise RequestError(f"{name} is {value!r}; it must be an integer {limit}", name)

    def _numbers(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, LEAST_REPETITION_PENALTY, 10.0)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _items(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values or (), Iterable):
        raise RequestError(f"{name} is {values!r}; it must be a list", name)
    return tuple(values or ())


def _number(name: str, value: Any, low: float, high: float) -> None:
    """Check a real number in ``[low, high]``."""
    if not (isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high):
        raise RequestError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}", name.split("[")[0])
