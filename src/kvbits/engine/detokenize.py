"""Text from tokens as they come. No torch.

A token may end inside a UTF-8 character; what is not sure yet is held back.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Sequence

_BROKEN = "\ufffd"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_LONG = 32
_SURE = 8


class Kind(enum.Enum):
    """What a token is to the text around it.

    ``SKIPPED`` leaves none (special, or no token at all). ``WHOLE`` begins and ends between characters. ``PART`` may
    not: alone it shows a replacement character. ``BYTE`` is one byte of a vocabulary with byte fallback, whose decoder
    takes a run of them together: where one is no UTF-8, every byte of the run becomes a replacement character.
    """

    SKIPPED = enum.auto()
    WHOLE = enum.auto()
    PART = enum.auto()
    BYTE = enum.auto()


class TokenDecoder:
    """A vocabulary's decoder: token ids to text without special tokens, and what kind each token is.

    ``decode`` maps ids to text. ``name`` is the token's entry in the vocabulary, ``None`` for an id that has none;
    ``special`` are the ids that ``decode`` leaves out.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        name: Callable[[int], str | None] | None = None,
        special: Iterable[int] = (),
    ) -> None:
        self._decode = decode
        self._name = name
        self._special = frozenset(special)
        self._known: dict[int, tuple[Kind, int]] = {}

    def __call__(self, ids: list[int]) -> str:
        return self._decode(ids)

    def look(self, token: int) -> tuple[Kind, int]:
        """The kind of ``token`` and the characters that it shows alone."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look(token)
        return found

    def bytes(self, token: int) -> bytes | None:
        """What ``token`` adds to a text that it does not begin, as UTF-8; nothing for one that leaves no text.

        ``None``: it is part of a character, and only the vocabulary's own bytes tell which.
        """
        kind, _ = self.look(token)
        if kind is Kind.BYTE and self._name is not None:
            return bytes([int((self._name(token) or "")[3:5], 16)])
        if kind is Kind.WHOLE:
            # Twice: the second stands behind a whole token, which is itself.
            return self._decode([token, token]).removeprefix(self._decode([token])).encode()
        return b"" if kind is Kind.SKIPPED else None

    def _look(self, token: int) -> tuple[Kind, int]:
        name = "" if self._name is None else self._name(token)
        if name is None or token in self._special:
            return Kind.SKIPPED, 0
        text = self._decode([token])
        if _BYTE.fullmatch(name) and text != name:
            return Kind.BYTE, len(text)
        # A vocabulary may have the replacement character as a token of its own.
        return Kind.PART if _BROKEN in text and _BROKEN not in name else Kind.WHOLE, len(text)


class Detokenizer:
    """Turns a growing token list into text that only grows: in the end what ``decode`` gives for the whole list.

    ``decode`` is called on the newest tokens alone, behind one whole token, which tells it that they do not begin the
    text (a word's space). A replacement character at the end may be an unfinished character, and of a run of single
    bytes nothing is sure before it ends; both wait for the next token or for :meth:`flush`.

    ``before`` are the tokens that the text continues: what they show is not repeated, but the first word keeps its
    space and a character that they began is finished. A special token at their end begins a text anew.
    """

    def __init__(self, decode: TokenDecoder, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = _tail(decode, before)
        """One whole token (none at a text's beginning) and those behind it that are none or not yet shown."""
        self._prompt = decode(self._window) if self._window else ""
        self._shown = len(self._prompt)
        self._bytes = any(decode.look(token)[0] is Kind.BYTE for token in self._window)

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain."""
        kind, size = self._decode.look(token)
        if kind is Kind.SKIPPED:
            return ""
        self._window.append(token)
        if kind is Kind.WHOLE:
            new = self._new(self._decode(self._window))
            self._window, self._shown, self._bytes, self._prompt = [token], size, False, ""
            return new
        self._bytes = self._bytes or kind is Kind.BYTE
        return "" if self._bytes else self._parts()

    def flush(self) -> str:
        """What was still held back."""
        text = self._new(self._decode(self._window)) if self._window else ""
        self._window, self._shown, self._bytes = [], 0, False
        return text

    def _parts(self) -> str:
        text = self._decode(self._window)
        sure = len(text.rstrip(_BROKEN))
        head = ""
        if len(self._window) > _LONG:
            # A character is shorter than the tail: if it is no part of one now, it is none with whatever follows.
            head = self._decode(self._window[:-_SURE])
            if head + self._decode(self._window[-_SURE:]) != text:
                head = ""
        sure = max(sure, len(head))
        new = self._new(text[:sure])
        self._shown = max(self._shown, sure)
        if head:
            self._window, self._shown, self._prompt = self._window[-_SURE:], self._shown - len(head), ""
        return new

    def _new(self, text: str) -> str:
        if self._prompt:
            # The first text of ours: a character that the prompt left broken may be whole by now, then it is ours too.
            pairs = enumerate(zip(self._prompt, text, strict=False))
            common = next((i for i, (a, b) in pairs if a != b), min(len(self._prompt), len(text)))
            if common == len(text):
                return ""
            self._shown, self._prompt = common, ""
        return text[self._shown :]


def _tail(decode: TokenDecoder, before: Sequence[int]) -> list[int]:
    """The last whole token of ``before`` and all behind it; nothing of what stands before a special token."""
    start = len(before)
    while start > 0:
        start -= 1
        kind, _ = decode.look(before[start])
        if kind is Kind.SKIPPED:
            return list(before[start + 1 :])
        if kind is Kind.WHOLE:
            break
    return list(before[start:])
