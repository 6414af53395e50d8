"""Text from tokens as they come. No torch.

A token may end inside a UTF-8 character; what is not sure yet is held back.
"""

from __future__ import annotations

from collections.abc import Callable

_BROKEN = "\ufffd"
_LONG = 24
_CONTEXT = 6


class Detokenizer:
    """Turns a growing token list into text that only grows.

    ``decode`` maps token ids to text (special tokens dropped). It is called on a short window of the newest tokens:
    the text of older ones cannot change. Replacement characters at the end may be an unfinished character, so they
    wait for the next token or for :meth:`flush`.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain."""
        self._window.append(token)
        text = self._decode(self._window)
        stable = text.rstrip(_BROKEN)
        new = stable[self._shown :]
        self._shown = max(self._shown, len(stable))
        if len(self._window) >= _LONG and len(stable) == len(text):
            # Leading tokens give a decoder its context (a word's first space); what they add is already shown.
            self._window = self._window[-_CONTEXT:]
            self._shown = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """What was still held back."""
        text = self._decode(self._window)[self._shown :] if self._window else ""
        self._window, self._shown = [], 0
        return text
