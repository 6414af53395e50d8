"""One sequence's pages."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvbits.pages.allocator import Frames
from kvbits.pages.groups import GONE


@dataclass(frozen=True)
class SequencePages:
    """One sequence's part of a step: ``count`` new tokens after ``start`` stored ones, and its frames.

    ``sealed[p * groups + g]`` is the frame of group ``g`` of page ``p`` for every page that is full when the step ends,
    -1 where it was given back. Where the first page has a format of its own its frames are ``sink`` (empty until it is
    full), and ``sealed`` begins with page 1. ``head`` are the frames of the open page that holds token ``start``;
    ``tail`` those of the page that holds token ``start + count``. They are the same, except in a tentative
    (speculative) step that crosses a page boundary, where the head must outlive the step. ``slot`` holds the states of
    recurrent layers; ``trail``: where those before each guessed token go.
    """

    start: int
    count: int
    sealed: Sequence[int]
    head: Sequence[int]
    tail: Sequence[int]
    sink: Sequence[int] = ()
    groups: int = 1
    slot: int = -1
    trail: Sequence[int] = ()


@dataclass(frozen=True)
class Reservation:
    """Frames taken for a step: ``sealed`` for the pages that it completes, ``tail`` if the head must outlive it.

    ``new_open``: the open page was taken by this reservation and holds nothing yet.
    """

    count: int
    tentative: bool
    sealed: Frames
    tail: Frames | None
    new_open: bool


@dataclass
class SequenceTable:
    """What a sequence holds: ``sealed`` frames page after page (the first may take more), then at most one open page.

    ``hash`` is the chain hash of the sealed pages. Of group ``g`` the first ``gone[g]`` pages were given back: their
    places in ``sealed`` are :data:`kvbits.pages.groups.GONE`. ``goals``: after how many pages the
    states of recurrent layers are kept: all full ones of the text that was asked for, and those that another text
    shares. Empty where none was asked for: then no state is kept to be found.
    """

    hash: bytes
    gone: list[int]
    tokens: array[int] = field(default_factory=lambda: array("q"))
    sealed: array[int] = field(default_factory=lambda: array("i"))
    open: Frames | None = None
    reservation: Reservation | None = None
    goals: set[int] = field(default_factory=set)

    def held(self) -> list[int]:
        """The frames of the sealed pages that are kept."""
        return [frame for frame in self.sealed if frame != GONE]

    def move(self, moves: Mapping[int, int]) -> None:
        """Frames of sealed pages have become others."""
        if not moves.keys().isdisjoint(self.sealed):
            self.sealed = array("i", (moves.get(frame, frame) for frame in self.sealed))
        if self.reservation is not None:
            frames = tuple(moves.get(frame, frame) for frame in self.reservation.sealed)
            self.reservation = replace(self.reservation, sealed=frames)
