"""Stop strings in a growing text: one automaton for all of a request, and each character is looked at once. No torch.

Aho and Corasick, "Efficient string matching: an aid to bibliographic search", 1975.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """The states of a set of stop strings; built once and shared by all sequences of a request.

    A state is the longest end of the text that is a beginning of some stop string; ``depth`` is its length. Building
    takes time and memory in proportion to the characters of all ``stops``.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self.depth = [0]
        self._ends: list[str | None] = [None]
        for stop in stops:
            state = 0
            for character in stop:
                state = self._child(state, character)
            self._ends[state] = stop
        self._link()

    def __bool__(self) -> bool:
        return len(self.depth) > 1

    def step(self, state: int, character: str) -> int:
        """The state after ``character``. Over a whole text this takes constant time a character."""
        following = self._next
        while True:
            target = following[state].get(character)
            if target is not None:
                return target
            if state == 0:
                return 0
            state = self._fail[state]

    def end(self, state: int) -> str | None:
        """The longest stop string that the text ends with in ``state``."""
        return self._ends[state]

    def _child(self, state: int, character: str) -> int:
        found = self._next[state].get(character)
        if found is None:
            found = self._next[state][character] = len(self.depth)
            self._next.append({})
            self._fail.append(0)
            self.depth.append(self.depth[state] + 1)
            self._ends.append(None)
        return found

    def _link(self) -> None:
        """Where each state goes on when no stop string continues it, the shorter ones first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                queue.append(child)
                self._fail[child] = self.step(self._fail[state], character)
            if self._ends[state] is None:
                self._ends[state] = self._ends[self._fail[state]]


class StopStrings:
    """Finds the first stop string in a growing text and holds back what may become one; ``keep``: it is shown too."""

    def __init__(self, stops: StopAutomaton, keep: bool = False) -> None:
        self._automaton = stops
        self._keep = keep
        self._state = 0
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is safe to show after ``text`` came, and the stop string that ended it, if one did.

        The match that is complete first wins, and of several that end together the longest, as if the text had come one
        character at a time.
        """
        automaton = self._automaton
        if not automaton:
            return text, None
        state = self._state
        for place, character in enumerate(text, start=1):
            state = automaton.step(state, character)
            stop = automaton.end(state)
            if stop is not None:
                shown = (self._held + text[:place])[: None if self._keep else -len(stop)]
                self._state, self._held = 0, ""
                return shown, stop
        self._state = state
        whole = self._held + text
        cut = len(whole) - automaton.depth[state]
        self._held = whole[cut:]
        return whole[:cut], None

    def flush(self) -> str:
        """What was still held back."""
        text, self._held, self._state = self._held, "", 0
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a true beginning of ``stop``, which is short."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
