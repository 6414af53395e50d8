"""Where the states of recurrent layers lie in a slot, and how many slots a memory has: shared by pool and planner."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from kvbits.config import AUTO, ModelGeometry, align
from kvbits.errors import ConfigError
from kvbits.memory import show

_SHARE, _LEAST = 2, 8
"""Slots take at most one part in so many of the cache's memory, and at least one in so many: small states are kept
often."""


@dataclass(frozen=True)
class StateLayout:
    """A slot holds all states of one sequence, ``geometry.states`` one after another from ``offsets`` on."""

    offsets: tuple[int, ...]
    slot_bytes: int

    @classmethod
    def of(cls, geometry: ModelGeometry, itemsize: int = 2) -> StateLayout | None:
        """The layout for a model that computes in ``itemsize`` bytes; ``None`` for one without recurrent layers."""
        if not geometry.states:
            return None
        ends = tuple(accumulate(align(state.nbytes(itemsize)) for state in geometry.states))
        return cls((0, *ends[:-1]), ends[-1])

    def memory_for(self, sequences: int) -> int:
        """Bytes with which :meth:`slots` has as many as ``sequences`` sequences can use."""
        return _SHARE * (2 * sequences + 1) * self.slot_bytes

    def slots(self, memory: int, sequences: int) -> int:
        """Slots of a cache of ``memory`` bytes that up to ``sequences`` sequences use at once.

        Each has one, and as many or more keep states for prompts that begin alike. Raises ``ConfigError`` when half of
        the memory holds none.
        """
        found = min(2 * sequences + 1, memory // _SHARE // self.slot_bytes)
        found = max(found, memory // _LEAST // self.slot_bytes)
        if not found:
            raise ConfigError(
                f"kv_cache_memory is {show(memory)}; the recurrent layers keep {show(self.slot_bytes)} of each "
                "sequence, and may take half of it"
            )
        return found


def stored_as(state_dtype: str) -> str:
    """How results of a cache dtype are labelled further, whose recurrent states are stored in ``state_dtype``."""
    return "" if state_dtype == AUTO else f", states in {state_dtype}"
