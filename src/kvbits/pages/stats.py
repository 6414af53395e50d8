"""What the pool holds, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kvbits.pages.tier import TierStats


@dataclass(frozen=True)
class StateStats:
    """Slots of recurrent layers' states: ``free``, of ``sequences`` (guesses included), of ``snapshots``."""

    free: int
    sequences: int
    snapshots: int


@dataclass(frozen=True)
class PoolStats:
    """Frames by what they are, and what the prefix cache did.

    ``free + open + sealed + cached == num_frames``. ``open`` and ``sealed`` belong to running sequences (a frame that
    several of them share counts once); ``shared`` of those have more than one owner. ``cached`` frames have no owner
    and are kept for their content. ``queries`` and ``hits`` count tokens asked for and found when sequences were
    opened; ``evictions`` counts cached pages given up; ``groups`` are the frames of sealed pages, in use or cached, by
    group of layers; ``tier`` is what became of those in the second tier; ``states`` where there are recurrent layers.
    """

    num_frames: int
    free: int
    open: int
    sealed: int
    shared: int
    cached: int
    queries: int
    hits: int
    evictions: int
    groups: tuple[int, ...] = ()
    tier: TierStats | None = None
    states: StateStats | None = None
