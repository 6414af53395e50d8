"""Control tokens that the text of a message spells stay text; those that the chat template writes are tokens.

Before a template is rendered, what spells a control token in its inputs is replaced by marks of private-use characters,
so that afterwards what is left is the template's own. Then the whole text is encoded at once, so that every piece has
the context that it always has, by a copy of the tokenizer in which the control tokens have other, secret names: the
template's are written by these names, and the spelled ones mean nothing to it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_OPEN, _CLOSE, _WALL = "\U0010fff0", "\U0010fff1", "\U0010fff2"
_ESCAPED = r"\udbff\udff0", r"\udbff\udff1", r"\udbff\udff2"
"""The marks where a template writes its inputs as ASCII JSON."""

_FIRST = 2
"""Characters of a name by which a text is looked at before all names are looked for in it."""

_PLACE = re.compile(rf"(?:{_OPEN}|{re.escape(_ESCAPED[0])})([0-9]+)(?:{_CLOSE}|{re.escape(_ESCAPED[1])})")
_WALLS = re.compile(f"{_WALL}|{re.escape(_ESCAPED[2])}")
_MARKS = frozenset({_OPEN, _WALL, *(escaped[:_FIRST] for escaped in _ESCAPED)})
"""How all that these find begins."""
_MARK = 64
"""Characters of a mark in any form, at most."""

_PIECE = 1 << 16
"""Characters that are searched at once: Python's lock is held for as long, by a text of eight MiB for a second."""

BYTE = re.compile("<0x[0-9A-F]{2}>")
_SPELLED_AS_CONTROL = re.compile("<[|\uff5c].+[|\uff5c]>", re.DOTALL)


class ControlTokens:
    """The control tokens of a Hugging Face tokenizer: its special tokens, and added ones that are written ``<|like|>``.

    Others that were added (``<think>``, ``<tool_call>``, runs of blanks) are words of the text and stay what they are.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        names = [name for name, token in added.items() if token.special or _SPELLED_AS_CONTROL.fullmatch(name)]
        # Bytes of a vocabulary that falls back to them are no control tokens, whatever their flags.
        self._names = sorted((n for n in names if n and not BYTE.fullmatch(n)), key=len, reverse=True)
        self._control = _any_of(self._names)
        self._firsts = frozenset(name[:_FIRST] for name in self._names)
        # Marks in a text of somebody else's are hidden too, so that nobody can write one.
        self._hidden = [*self._names, _OPEN, _CLOSE, _WALL, *_ESCAPED]
        self._number = {name: number for number, name in enumerate(self._hidden)}
        self._to_hide = _any_of(self._hidden)
        self._begins = frozenset(name[:size] for name in self._names for size in range(1, len(name)))
        self._ends = frozenset(name[size:] for name in self._names for size in range(1, len(name)))
        self._longest = max(map(len, self._names), default=0)

    def hide(self, value: Any) -> Any:
        """``value`` with marks in the place of control tokens, in all strings of it, keys of mappings included.

        A wall stands where a string ends or begins with a part of a control token: two strings side by side make none.
        """
        if isinstance(value, str):
            firsts = self._firsts | _MARKS | {_CLOSE}
            found = self._sub(self._to_hide, firsts, lambda m: f"{_OPEN}{self._number[m.group()]}{_CLOSE}", value)
            sizes = range(1, min(len(value), self._longest - 1) + 1)
            if any(value[-size:] in self._begins for size in sizes):
                found += _WALL
            if any(value[:size] in self._ends for size in sizes):
                found = _WALL + found
            return found
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def encode(self, rendered: str, plain: Callable[[str], list[int]]) -> list[int]:
        """Token ids of what a template made of hidden inputs; ``plain`` encodes a text without any.

        Raises ``ValueError`` for a tokenizer that cannot do it.
        """
        text = self.restore(rendered)
        if self._controls(text) == self._controls(rendered):
            return plain(text)
        if not self._tokenizer.is_fast:
            return self._encode_pieces(rendered)
        copy, alias = self._renamed
        named = self._sub(self._control, self._firsts, lambda match: alias[match.group()], rendered)
        # The call for a batch lets other threads run, the one for a text does not.
        return list(copy.encode_batch_fast([self.restore(named)], add_special_tokens=False)[0].ids)

    def restore(self, rendered: str) -> str:
        """What a template made, with all that was hidden in its place."""
        text = self._sub(_WALLS, _MARKS, lambda match: "", rendered)
        return self._sub(_PLACE, _MARKS, lambda match: self._hidden[int(match.group(1))], text)

    def _controls(self, text: str) -> list[str]:
        return [match.group() for match in self._matches(self._control, self._firsts, text)]

    def _sub(
        self, pattern: re.Pattern[str], firsts: frozenset[str], replace: Callable[[re.Match[str]], str], text: str
    ) -> str:
        found, start = [], 0
        for match in self._matches(pattern, firsts, text):
            found += [text[start : match.start()], replace(match)]
            start = match.end()
        return "".join([*found, text[start:]])

    def _matches(self, pattern: re.Pattern[str], firsts: frozenset[str], text: str) -> Iterator[re.Match[str]]:
        """As ``pattern.finditer``, for what is no longer than a control token or a mark and begins with a ``firsts``.

        Other threads may run.
        """
        start, reach = 0, max(self._longest, _MARK)
        while start < len(text):
            end = start + _PIECE
            following = end
            # Most texts have none of them, and this is a hundred times as fast.
            if not any(text.find(first, start, end + _FIRST) >= 0 for first in firsts):
                start = end
                continue
            for match in pattern.finditer(text, start, end + reach):
                if match.start() >= end:
                    break
                yield match
                following = max(end, match.end())
            start = following

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str]]:
        """A copy of the tokenizer with other names for the control tokens, and these names."""
        nonce = secrets.token_hex(16)
        alias = {name: f"\U0010fff3{nonce}{number}\U0010fff4" for number, name in enumerate(self._names)}
        description = renamed(self._tokenizer.backend_tokenizer, alias)
        copy = Tokenizer.from_str(json.dumps(description))
        for name, other in alias.items():
            if copy.token_to_id(other) != self._tokenizer.convert_tokens_to_ids(name):
                raise ValueError(f"the control token {name!r} cannot be told from its text")
        return copy, alias

    def _encode_pieces(self, rendered: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in [*self._matches(self._control, self._firsts, rendered), None]:
            piece = self.restore(rendered[start : len(rendered) if match is None else match.start()])
            if piece:
                ids += self._tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if match is not None:
                ids.append(int(self._tokenizer.convert_tokens_to_ids(match.group())))
                start = match.end()
        return ids


def renamed(tokenizer: Tokenizer, alias: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of ``tokenizer`` with other names for some of its tokens; it adds none to a text, nor pads or cuts."""
    description: dict[str, Any] = json.loads(tokenizer.to_str())
    description["post_processor"] = description["truncation"] = description["padding"] = None
    for token in description["added_tokens"]:
        token["content"] = alias.get(token["content"], token["content"])
    model = description["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {alias.get(piece, piece): number for piece, number in vocab.items()}
    else:
        model["vocab"] = [[alias.get(piece, piece), score] for piece, score in vocab]
    if "merges" in model:
        # Some vocabularies can put a control token together from its letters.
        pairs = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & alias.keys()]
    if model.get("unk_token") is not None:
        model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
    return description


def _any_of(names: list[str]) -> re.Pattern[str]:
    """The first of ``names``, longest first, that stands somewhere; what they begin with alike is looked at once."""
    return re.compile(_branches(names) if names else "(?!)")


def _branches(names: list[str]) -> str:
    by_first: dict[str, list[str]] = {}
    for name in names:
        by_first.setdefault(name[:1], []).append(name[1:])
    # An end comes last: of two names of which one begins the other, the longer one is meant.
    ends = by_first.pop("", None) is not None
    parts = [re.escape(first) + _branches(rests) for first, rests in by_first.items()]
    if not parts:
        return ""
    found = parts[0] if len(parts) == 1 and not ends else f"(?:{'|'.join(parts)})"
    return f"{found}?" if ends else found
