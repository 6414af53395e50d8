"""Which replica takes a request: by what is under way, by how full the pools are, and by who holds its pages."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import NamedTuple

FULL = 0.9
"""Share of a pool from which on running requests may be preempted: a replica that has more comes last."""


class ReplicaLoad(NamedTuple):
    """A replica: requests under way, share of its pool that running sequences hold, blocks that it was given."""

    requests: int
    usage: float = 0.0
    held: int = 0

    @property
    def rank(self) -> tuple[bool, int, float, int]:
        """Less is better. What was held decides only between replicas that are otherwise alike."""
        return self.usage >= FULL, self.requests, round(self.usage, 1), self.held


def choose(preferred: str | None, loads: Mapping[str, ReplicaLoad], imbalance: int, random: Random) -> list[str]:
    """The replicas of ``loads`` in the order in which to try them.

    The better of two random ones is first (Mitzenmacher, "The Power of Two Choices", 2001: senders that know the loads
    only late do not all run to the same replica). But ``preferred`` goes before, unless it has more than ``imbalance``
    requests more than the least loaded, or its pool is full and another one's is not.
    """
    names = sorted(loads)
    pair = random.sample(names, min(2, len(names)))
    order = sorted(pair, key=lambda name: loads[name].rank)
    order += sorted((name for name in names if name not in pair), key=lambda name: loads[name].rank)
    if preferred is not None and preferred in loads and not _overloaded(loads[preferred], loads, imbalance):
        order.remove(preferred)
        order.insert(0, preferred)
    return order


def _overloaded(load: ReplicaLoad, loads: Mapping[str, ReplicaLoad], imbalance: int) -> bool:
    if load.requests - min(other.requests for other in loads.values()) > imbalance:
        return True
    return load.usage >= FULL and any(other.usage < FULL for other in loads.values())
