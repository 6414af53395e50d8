"""Who owns which page: plain integers, no tensors."""

from kvbits.pages.manager import PageManager
from kvbits.pages.stats import PoolStats
from kvbits.pages.table import SequencePages
from kvbits.pages.tier import Mover, PageSource, SecondTier, TierStats

__all__ = ["Mover", "PageManager", "PageSource", "PoolStats", "SecondTier", "SequencePages", "TierStats"]
