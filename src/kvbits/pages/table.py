"""One sequence's pages."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbits.pages.allocator import Frames


@dataclass(frozen=True)
class SequencePages:
    """One sequence's part of a step: ``count`` new tokens after ``start`` stored ones, and its frames.

    ``sealed[p]`` is the frame of page ``p`` for every page that is full when the step ends. Where the first page has a
    format of its own its frames are ``sink`` (empty until it is full), and ``sealed`` begins with page 1. ``head`` are
    the frames of the open page that holds token ``start``; ``tail`` those of the page that holds token ``start +
    count``. They are the same, except in a tentative (speculative) step that crosses a page boundary, where the head
    must outlive the step.
    """

    start: int
    count: int
    sealed: Sequence[int]
    head: Sequence[int]
    tail: Sequence[int]
    sink: Sequence[int] = ()


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

    ``hash`` is the chain hash of the sealed pages.
    """

    hash: bytes
    tokens: array[int] = field(default_factory=lambda: array("q"))
    sealed: list[int] = field(default_factory=list)
    open: Frames | None = None
    reservation: Reservation | None = None

    def page(self, number: int, sealed_frames: int, first_frames: int) -> Frames:
        """The frames of sealed page ``number``, when page 0 takes ``first_frames`` and the others ``sealed_frames``."""
        if number == 0:
            return tuple(self.sealed[:first_frames])
        start = first_frames + (number - 1) * sealed_frames
        return tuple(self.sealed[start : start + sealed_frames])
