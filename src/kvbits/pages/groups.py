"""Parts of a page: what each group of layers holds of it, and which parts are given back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

GONE = -1
"""The place of a frame that was given back."""


@dataclass(frozen=True)
class PageGroup:
    """Layers whose pages are kept equally long.

    A sealed page takes ``frames`` frames, a sequence's first page ``first_frames`` (``None``: as many). ``kept``:
    sealed pages that the next token can see; older ones are given back. ``None``: all are kept.
    """

    frames: int = 1
    first_frames: int | None = None
    kept: int | None = None

    @property
    def first(self) -> int:
        """Frames of a sequence's first page."""
        return self.frames if self.first_frames is None else self.first_frames

    def oldest(self, pages: int) -> int:
        """The oldest page that is kept when ``pages`` are sealed."""
        return 0 if self.kept is None else max(0, pages - self.kept)

    def held(self, pages: int) -> int:
        """Frames of the kept ones of ``pages`` sealed pages."""
        oldest = self.oldest(pages)
        return (pages - oldest) * self.frames + (self.first - self.frames if oldest == 0 < pages else 0)


class PageShape:
    """A page is one part for each of ``groups``; a sequence's frames lie page after page, part after part."""

    def __init__(self, groups: Sequence[PageGroup]) -> None:
        self.groups = tuple(groups)
        self.frames = sum(group.frames for group in groups)
        self.first_frames = sum(group.first for group in groups)
        self.frees = any(group.kept is not None for group in groups)
        self._starts = _starts([group.frames for group in groups])
        self._first_starts = _starts([group.first for group in groups])

    def total(self, pages: int) -> int:
        """Places of ``pages`` pages."""
        return self.first_frames + (pages - 1) * self.frames if pages else 0

    def pages(self, places: int) -> int:
        """Pages that have so many places."""
        return 1 + (places - self.first_frames) // self.frames if places else 0

    def part(self, page: int, group: int) -> slice:
        """The places of one group's part of a page."""
        starts = self._starts if page else self._first_starts
        start = self.total(page)
        return slice(start + starts[group], start + starts[group + 1])

    def size(self, page: int, group: int) -> int:
        """Frames of one group's part of a page."""
        return self.groups[group].frames if page else self.groups[group].first

    def kept_parts(self, pages: int) -> Iterator[tuple[int, int]]:
        """Page and group of what is kept of ``pages`` sealed pages, in the order of the places."""
        oldest = [group.oldest(pages) for group in self.groups]
        for page in range(pages):
            yield from ((page, number) for number, first in enumerate(oldest) if page >= first)

    def held(self, pages: int) -> int:
        """Frames of what is kept of ``pages`` sealed pages."""
        return sum(group.held(pages) for group in self.groups)

    def pages_in(self, frames: int) -> int:
        """Sealed pages of one sequence that ``frames`` frames hold, where some group keeps all; else no bound."""
        low, high = 0, frames
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.held(middle) <= frames else (low, middle - 1)
        return low

    def ahead(self, pages: int, more: int, at_once: int) -> int:
        """Most frames beyond those of ``pages`` pages while ``more`` are sealed, up to ``at_once`` in one step."""
        end = pages + more
        total = 0
        for group in self.groups:
            most = end if group.kept is None else min(end, group.kept + min(more, at_once))
            first = group.first - group.frames if end and not pages else 0
            total += max(0, (most - pages + group.oldest(pages)) * group.frames + first)
        return total


def part_key(page: bytes, group: int) -> bytes:
    """What a group's part of the page with this hash is known by."""
    return page + group.to_bytes(2, "little") if group else page


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts
