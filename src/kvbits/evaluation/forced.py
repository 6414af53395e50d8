"""Force a given answer through the engine, token by token, and see how likely the model found it.

The answer travels as a grammar that allows one token at a time, so it takes the way of any request: continuous
batching, prefix caching, decode kernels. Log-probabilities and ranks are of the model's own distribution, before the
grammar. An answer whose tokens all rank first is exactly what greedy decoding would have said.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbits.engine.grammar import Grammar, Matcher
from kvbits.engine.params import SamplingParams


class _OneWay(Matcher):
    """Allows the next token of the answer and no other."""

    def __init__(self, tokens: Sequence[int], vocab: int) -> None:
        self._tokens = tokens
        self._mask = torch.zeros(vocab, dtype=torch.bool)
        self._at = 0

    def allowed(self) -> Tensor:
        mask = self._mask.clone()
        mask[self._tokens[self._at]] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self._tokens[self._at], (token, self._at)
        self._at += 1

    @property
    def finished(self) -> bool:
        return self._at == len(self._tokens)


class Forced(Grammar):
    """The grammar of one answer, given as token ids."""

    def __init__(self, tokens: Sequence[int], vocab: int) -> None:
        assert tokens, "an answer has at least one token"
        self._tokens = list(tokens)
        self._vocab = vocab

    def start(self) -> Matcher:
        return _OneWay(self._tokens, self._vocab)


def forced(tokens: Sequence[int], vocab: int) -> SamplingParams:
    """Parameters of a request that answers ``tokens`` and reports each one's log-probability and rank."""
    return SamplingParams(
        max_tokens=len(tokens), temperature=0.0, ignore_eos=True, logprobs=0, grammar=Forced(tokens, vocab)
    )
