"""The second tier: pages that the pool gave up, kept elsewhere as the same bytes until they are asked for again.

This module decides which page lies in which slot and when one has to go; a :class:`Mover` copies the bytes. What goes
wrong there is never an error of the cache, which can always compute a page again: a damaged page is dropped and
counted, and after a failed write (a full disk) the tier only reads.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvbits.pages.allocator import Frames

log = logging.getLogger(__name__)

_STATE = b"state at the end of page "
"""How keys of states begin: no hash is as long."""


class PageSource(Protocol):
    """Where a page that the pool does not hold can come from."""

    def holds(self, key: bytes) -> bool:
        """Whether the page with this hash is there."""

    def fetch(self, key: bytes, frames: Frames) -> bool:
        """Write the page into ``frames`` of the pool; false, and ``frames`` hold nothing of use, when it is damaged."""


class Mover(Protocol):
    """Copies frames of the pool to numbered slots of the same size and back, and states to several of them. All raise
    ``OSError``.
    """

    def save(self, frame: int, slot: int) -> bytes:
        """Copy a frame to a slot; returns the checksum of the bytes."""

    def load(self, slot: int, frame: int, checksum: bytes) -> bool:
        """Copy a slot to a frame if its bytes have this checksum; otherwise leave the frame as it is."""

    def save_state(self, state: int, slots: Sequence[int]) -> bytes:
        """Copy a sequence's states of recurrent layers; returns the checksum of the bytes."""

    def stage_state(self, slots: Sequence[int], checksum: bytes) -> bool:
        """Read states into memory beside the pool; whether their bytes have this checksum."""

    def load_state(self, state: int) -> None:
        """Copy what was staged last to where a sequence's states lie."""


@dataclass(frozen=True)
class TierStats:
    """The second tier in numbers.

    ``used`` of ``slots`` slots (a slot holds one frame) keep ``pages`` pages and ``states`` states of recurrent layers.
    ``stored``, ``restored``, ``dropped`` and ``damaged`` count those that came, went back, made room and failed their
    checksum or could not be read; ``failed_writes`` those that could not be written, after which the tier is
    ``read_only``.
    """

    slots: int
    used: int
    pages: int
    states: int
    stored: int
    restored: int
    dropped: int
    damaged: int
    failed_writes: int
    read_only: bool


@dataclass(frozen=True)
class _Kept:
    slots: tuple[int, ...]
    checksums: tuple[bytes, ...]


class SecondTier:
    """A fixed number of slots; the page that was given up longest ago makes room.

    The pool gives up the end of a text before its beginning, so here too the end goes first. A page that went back to
    the pool keeps its slot, as it will be given up again. States of recurrent layers, which take ``state_slots`` slots,
    come and go as pages do.
    """

    def __init__(self, slots: int, mover: Mover, state_slots: int = 0) -> None:
        assert slots > 0, slots
        self.slots = slots
        self._state_slots = state_slots
        self.read_only = False
        self._mover = mover
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))
        self._stored = self._restored = self._dropped = self._damaged = self._failed = 0

    def holds(self, key: bytes) -> bool:
        """Whether the page with this hash is there."""
        return key in self._kept

    def keep(self, key: bytes, frames: Frames) -> None:
        """Copy a page that the pool gives up. Never fails: a page that cannot be kept is computed again one day."""
        self._keep(
            key, len(frames),
            lambda slots: tuple(self._mover.save(frame, slot) for frame, slot in zip(frames, slots, strict=True)),
        )  # fmt: skip

    def _keep(self, key: bytes, count: int, save: Callable[[tuple[int, ...]], tuple[bytes, ...]]) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        if self.read_only or count > self.slots:
            return
        while len(self._free) < count:
            _, oldest = self._kept.popitem(last=False)
            self._free.extend(oldest.slots)
            self._dropped += 1
        slots = tuple(self._free.pop() for _ in range(count))
        try:
            checksums = save(slots)
        # A full disk, or a device that could not be read: the pool needs the frames all the same.
        except Exception as error:
            self._free.extend(slots)
            self._failed += 1
            self.read_only = True
            log.warning("the offload tier only reads from now on: a page could not be written: %s", error)
            return
        self._kept[key] = _Kept(slots, checksums)
        self._stored += 1

    def fetch(self, key: bytes, frames: Frames) -> bool:
        """Write a page that is there into ``frames``; a damaged one is dropped, counted, and false is returned."""
        return self._read(
            key,
            lambda kept: (
                len(frames) == len(kept.slots)
                and all(
                    self._mover.load(slot, frame, checksum)
                    for slot, frame, checksum in zip(kept.slots, frames, kept.checksums, strict=True)
                )
            ),
        )

    def _read(self, key: bytes, load: Callable[[_Kept], bool]) -> bool:
        kept = self._kept.get(key)
        if kept is None:
            return False
        try:
            good = load(kept)
        except Exception as error:
            log.warning("an offloaded page could not be read: %s", error)
            good = False
        if good:
            self._restored += 1
        else:
            self._damaged += 1
            self._free.extend(self._kept.pop(key).slots)
        return good

    # States of recurrent layers, by the page at whose end they are

    def holds_state(self, page: bytes) -> bool:
        """Whether the states at the end of the page with this hash are there."""
        return _STATE + page in self._kept

    def keep_state(self, page: bytes, state: int) -> None:
        """:meth:`keep` for the states in the pool's slot ``state``."""
        self._keep(_STATE + page, self._state_slots, lambda slots: (self._mover.save_state(state, slots),))

    def stage_state(self, page: bytes) -> bool:
        """Read states for :meth:`load_state`; damaged ones are dropped, counted, and false is returned."""
        return self._read(_STATE + page, lambda kept: self._mover.stage_state(kept.slots, kept.checksums[0]))

    def load_state(self, state: int) -> None:
        """Write the states that were staged last into the pool's slot ``state``."""
        self._mover.load_state(state)

    def clear(self) -> None:
        """Forget every page."""
        for kept in self._kept.values():
            self._free.extend(kept.slots)
        self._kept.clear()

    def stats(self) -> TierStats:
        """The tier in numbers."""
        states = sum(key.startswith(_STATE) for key in self._kept) if self._state_slots else 0
        return TierStats(
            slots=self.slots,
            used=self.slots - len(self._free),
            pages=len(self._kept) - states,
            states=states,
            stored=self._stored,
            restored=self._restored,
            dropped=self._dropped,
            damaged=self._damaged,
            failed_writes=self._failed,
            read_only=self.read_only,
        )

    def check(self) -> None:
        """Raise ``AssertionError`` unless every slot is either free or one page's."""
        named = sorted([*self._free, *(slot for kept in self._kept.values() for slot in kept.slots)])
        if named != list(range(self.slots)):
            raise AssertionError(f"slots free or kept: {named}; there are {self.slots}")
