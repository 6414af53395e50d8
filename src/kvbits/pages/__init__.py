"""Who owns which page: plain integers, no tensors."""

from kvbits.pages.groups import PageGroup
from kvbits.pages.manager import PageManager
from kvbits.pages.states import StateSlots
from kvbits.pages.stats import PoolStats
from kvbits.pages.table import SequencePages
from kvbits.pages.tier import Mover, PageSource, SecondTier, TierStats

__all__ = [
    "Mover",
    "PageGroup",
    "PageManager",
    "PageSource",
    "PoolStats",
    "SecondTier",
    "SequencePages",
    "StateSlots",
    "TierStats",
]
