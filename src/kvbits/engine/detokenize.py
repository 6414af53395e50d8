"""Text from tokens as they come. No torch.

A token may end inside a UTF-8 character, and a stop string may span tokens; both hold text back until it is sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class StopStrings:
    """Finds the first stop string in a growing text and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is safe to show after ``text`` came, and the stop string that ended it, if one did."""
        if not self._stops:
            return text, None
        self._held += text
        places = [(self._held.find(s), s) for s in self._stops]
        hits = [(place, stop) for place, stop in places if place >= 0]
        if hits:
            # The match that is complete first wins, as if the text had come one character at a time.
            place, stop = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            shown, self._held = self._held[:place], ""
            return shown, stop
        keep = max((overlap(self._held, s) for s in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def flush(self) -> str:
        """What was still held back."""
        text, self._held = self._held, ""
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a true beginning of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
