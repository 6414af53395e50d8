"""Answers that must follow a grammar: JSON, a JSON schema, or llguidance's dialect of Lark.

llguidance does the parsing; here a grammar becomes a mask over the model's vocabulary before each token is chosen.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from kvbits.engine.text import end_tokens
from kvbits.errors import RequestError
from kvbits.models import LoadedModel

WHITESPACE = r"\n? {0,16}"
"""Between the tokens of JSON: any usual layout, but no endless run of blanks."""

SAME_LINE = r" ?"
"""Between the tokens of JSON inside a tool call, which models write on one line."""


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros(-(-vocab // 32), dtype=np.int32)
        self._vocab = vocab

    def allowed(self) -> Tensor:
        """Which tokens may come next, ``bool [vocab]``. Raises ``RequestError`` when the grammar allows none."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot go on: {_first_line(self._matcher.get_error())}")
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab]
        if not bits.any():
            raise RequestError("the grammar allows no further token")
        return torch.from_numpy(bits.view(np.bool_))

    def accept(self, token: int) -> None:
        """Move on by a token that :meth:`allowed` allowed."""
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing may follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()


class Grammar:
    """A compiled grammar; each sequence starts its own :class:`Matcher` from it."""

    def __init__(self, compiled: LLMatcher, vocab: int) -> None:
        self._compiled = compiled
        self._vocab = vocab

    def start(self) -> Matcher:
        """A matcher at the grammar's start."""
        return Matcher(self._compiled.deep_copy(), self._vocab)


class GrammarCompiler:
    """Compiles grammars for one model. Raises ``RequestError`` when its tokenizer cannot be used for it."""

    def __init__(self, loaded: LoadedModel) -> None:
        tokenizer: Any = loaded.tokenizer
        if tokenizer is None or not tokenizer.is_fast:
            raise RequestError(f"grammars need a fast tokenizer; {loaded.name} has none")
        self._vocab = loaded.geometry.vocab_size
        ends = sorted(end_tokens(loaded))
        try:
            text = tokenizer.backend_tokenizer.to_str()
            self._tokenizer = LLTokenizer(text, n_vocab=self._vocab, eos_token=ends or None)
        except ValueError as error:
            raise RequestError(f"grammars cannot use the tokenizer of {loaded.name}: {error}") from error

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Any) -> Grammar:
        """JSON that is valid for ``schema``. Raises ``RequestError`` for a schema that is wrong or unsupported."""
        return self.lark(f"start: {json_rule(schema)}")

    def lark(self, text: str) -> Grammar:
        """A grammar in llguidance's Lark. Raises ``RequestError`` with the reason when it does not compile."""
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(text), log_level=0)
        if matcher.is_error():
            raise RequestError(f"the schema cannot be used: {_first_line(matcher.get_error())}")
        return Grammar(matcher, self._vocab)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; a special token's name."""
        return bytes(self._tokenizer.decode_bytes([token]))


def json_rule(schema: Any, whitespace: str = WHITESPACE) -> str:
    """The right side of a Lark rule for JSON that is valid for ``schema``. Raises ``RequestError`` for no schema."""
    if not isinstance(schema, dict):
        raise RequestError(f"a JSON schema must be an object, not {type(schema).__name__}")
    # The pattern is ours: a schema must not choose how its answer is laid out.
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": whitespace}})


def literal(text: str) -> str:
    """``text`` as a Lark string."""
    return json.dumps(text)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "no reason given"
