"""Answers that must follow a grammar: JSON, a JSON schema, or llguidance's dialect of Lark.

llguidance does the parsing; here a grammar becomes a mask over the model's vocabulary before each token is chosen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from torch import Tensor

from kvbits.engine.schemas import fit
from kvbits.engine.text import end_tokens
from kvbits.errors import RequestError
from kvbits.models import LoadedModel
from kvbits.models.control import BYTE, renamed

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
        inner = tokenizer.backend_tokenizer
        # llguidance writes what a grammar spells with these tokens and then refuses them: under other names they are
        # only what a grammar names by its id.
        added = [(t.content, i) for i, t in inner.get_added_tokens_decoder().items() if _is_named(t)]
        self._marks = dict(sorted(added, key=lambda item: -len(item[0])))
        self._names = {token: name.encode() for name, token in added}
        self._split = re.compile("|".join(map(re.escape, self._marks)) or "(?!)")
        try:
            copy = renamed(inner, {name: f"<|\U0010fff3{token}|>" for name, token in added})
            self._tokenizer = LLTokenizer(json.dumps(copy), n_vocab=self._vocab, eos_token=ends or None)
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
        return self._compile(LLMatcher.grammar_from_lark(text))

    def _compile(self, grammar: str) -> Grammar:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the schema cannot be used: {_first_line(matcher.get_error())}")
        return Grammar(matcher, self._vocab)

    def regex(self, pattern: str) -> Grammar:
        """A text that matches all of a regular expression. Raises ``RequestError`` when it does not compile."""
        return self._compile(LLMatcher.grammar_from_regex(pattern))

    def choice(self, choices: Sequence[str]) -> Grammar:
        """One of several texts."""
        return self.lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices))

    def ebnf(self, text: str) -> Grammar:
        """A grammar in Lark or, where it has ``::=``, in llama.cpp's GBNF; the start is ``start`` or ``root``."""
        if "::=" in text:
            try:
                text = gbnf_to_lark(text)
            # The converter raises what it likes.
            except Exception as error:
                raise RequestError(f"the grammar cannot be used: {_first_line(str(error))}") from error
        return self.lark(text)

    def literal(self, text: str) -> str:
        """``text`` as part of a Lark rule: strings, and in their place the tokens that the vocabulary has for them."""
        parts, start = [], 0
        for match in self._split.finditer(text):
            parts += [_quoted(text[start : match.start()]), f"<[{self._marks[match.group()]}]>"]
            start = match.end()
        return " ".join(part for part in [*parts, _quoted(text[start:])] if part)

    def marks(self, text: str) -> list[int]:
        """The tokens in the place of strings in ``text``."""
        return [self._marks[match.group()] for match in self._split.finditer(text)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; a special token's name."""
        return self._names.get(token) or bytes(self._tokenizer.decode_bytes([token]))


def json_rule(schema: Any, whitespace: str = WHITESPACE) -> str:
    """The right side of a Lark rule for JSON that is valid for ``schema``. Raises ``RequestError`` for no schema."""
    if not isinstance(schema, dict):
        raise RequestError(f"a JSON schema must be an object, not {type(schema).__name__}")
    # The pattern is ours: a schema must not choose how its answer is laid out.
    return "%json " + json.dumps({**fit(schema), "x-guidance": {"whitespace_pattern": whitespace}})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _is_named(token: Any) -> bool:
    """Whether llguidance takes an added token for a name rather than for a text."""
    angled = token.content.startswith("<") and token.content.endswith(">")
    return (token.special or angled) and not BYTE.fullmatch(token.content)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "no reason given"
