"""Slots of recurrent layers' states: one for each sequence, and snapshots of states at the ends of pages.

A sequence that begins as another one did goes on from a snapshot, as it does from sealed pages, and only from there: so
a prompt is found up to the last page whose end has one. They are taken where a prompt's last full page ends, where it
parts from what other prompts have left, and at each end of a page on the way, where the next one of the same sequence
replaces it unless ``spacing`` pages divide its place. What was used longest ago makes room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection

from kvbits.errors import OutOfPages
from kvbits.pages.stats import StateStats
from kvbits.pages.tier import SecondTier

_CHAIN = 4
"""The snapshots of one sequence of the longest context take at most one slot in so many."""


class StateSlots:
    """Decides which slot holds which state. Knows integers, not bytes; ``copy`` copies a slot to another at once.

    ``longest``: pages of the longest sequence; ``tier`` gets snapshots that are given up.
    """

    def __init__(
        self, slots: int, longest: int, copy: Callable[[int, int], None], tier: SecondTier | None = None
    ) -> None:
        self.num_slots = slots
        self._tier = tier
        self.spacing = max(8, -(-longest // max(slots // _CHAIN, 1)))
        self._copy = copy
        self._free = list(range(slots - 1, -1, -1))
        self._own: dict[int, int] = {}
        self._trails: dict[int, tuple[int, ...]] = {}
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        self._passing: dict[int, bytes] = {}

    def stats(self) -> StateStats:
        """The slots in numbers."""
        free, kept = len(self._free), len(self._kept)
        return StateStats(free, self.num_slots - free - kept, kept)

    def available(self) -> int:
        """Slots that can be had: free ones, and those of snapshots."""
        return len(self._free) + len(self._kept)

    def open(self, seq_id: int) -> None:
        """A slot for a new sequence, whose state is that of no token. Raises ``OutOfPages`` when all are in use."""
        if not self.available():
            raise OutOfPages(f"sequence {seq_id} needs a slot for its states; all {self.num_slots} are in use")
        self._own[seq_id] = self._take()

    def fork(self, parent: int, child: int) -> None:
        """The same state for a new sequence. Raises ``OutOfPages`` as :meth:`open`."""
        self.open(child)
        self._copy(self._own[parent], self._own[child])

    def close(self, seq_id: int) -> None:
        """The sequence ends; snapshots of it stay."""
        self._drop_trail(seq_id)
        self._free.append(self._own.pop(seq_id))
        self._passing.pop(seq_id, None)

    def slot(self, seq_id: int) -> int:
        return self._own[seq_id]

    def holds(self, page: bytes) -> bool:
        """Whether there is a snapshot of the end of the page with this hash, here or in the second tier."""
        return page in self._kept or (self._tier is not None and self._tier.holds_state(page))

    def ready(self, page: bytes) -> bool:
        """Make :meth:`load` possible; false where the snapshot is damaged, and is none any more."""
        return page in self._kept or (self._tier is not None and self._tier.stage_state(page))

    def load(self, seq_id: int, page: bytes) -> None:
        """Let the sequence go on from the snapshot that was :meth:`ready` last."""
        if page in self._kept:
            self._kept.move_to_end(page)
            self._copy(self._kept[page], self._own[seq_id])
        else:
            assert self._tier is not None, page
            self._tier.load_state(self._own[seq_id])

    def save(self, seq_id: int, page: bytes, after: int, count: int, stays: bool) -> None:
        """Keep a state of the sequence, if a slot is to be had, as that at the end of ``page``.

        It is that after the first ``after`` of a step's ``count`` tokens, which is there after the last and where the
        rest are guesses. Unless it ``stays`` it goes when the sequence's next one comes.
        """
        trail = self._trails.get(seq_id, ())
        if after != count and not trail:
            return
        before = self._passing.pop(seq_id, None)
        source = self._own[seq_id] if after == count else trail[after - count]
        if page in self._kept:
            self._kept.move_to_end(page)
        else:
            if before is not None and before in self._kept:
                self._free.append(self._kept.pop(before))
            if not self.available():
                if stays and self._tier is not None:
                    self._tier.keep_state(page, source)
                return
            self._kept[page] = self._take()
            self._copy(source, self._kept[page])
        if not stays:
            self._passing[seq_id] = page

    def clear(self) -> None:
        """Forget all snapshots."""
        self._free.extend(self._kept.values())
        self._kept.clear()
        self._passing.clear()

    # Guesses

    def guess(self, seq_id: int, count: int) -> tuple[int, ...]:
        """Slots for the states before each of ``count`` guessed tokens; there must be as many to be had."""
        assert seq_id not in self._trails, seq_id
        self._trails[seq_id] = tuple(self._take() for _ in range(count))
        return self._trails[seq_id]

    def trail(self, seq_id: int) -> tuple[int, ...]:
        return self._trails.get(seq_id, ())

    def settle(self, seq_id: int, wrong: int) -> None:
        """The last ``wrong`` guesses did not hold: the state is that before them."""
        trail = self._trails.get(seq_id, ())
        if wrong:
            self._copy(trail[-wrong], self._own[seq_id])
        self._drop_trail(seq_id)

    def _drop_trail(self, seq_id: int) -> None:
        self._free.extend(self._trails.pop(seq_id, ()))

    def _take(self) -> int:
        if not self._free:
            page, slot = self._kept.popitem(last=False)
            if self._tier is not None:
                self._tier.keep_state(page, slot)
            self._free.append(slot)
        return self._free.pop()

    def check(self, sequences: Collection[int]) -> None:
        """Raise ``AssertionError`` unless every slot is free, a sequence's or a snapshot's."""
        trails = [slot for trail in self._trails.values() for slot in trail]
        named = sorted([*self._free, *self._own.values(), *self._kept.values(), *trails])
        if named != list(range(self.num_slots)) or set(self._own) != set(sequences):
            raise AssertionError(
                f"slots free {self._free}, of sequences {self._own}, of guesses {self._trails}, of snapshots "
                f"{list(self._kept.values())}; there are {self.num_slots} and the sequences {sorted(sequences)}"
            )
