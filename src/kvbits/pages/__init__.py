"""Who owns which page: plain integers, no tensors."""

from kvbits.pages.manager import PageManager
from kvbits.pages.stats import PoolStats
from kvbits.pages.table import SequencePages

__all__ = ["PageManager", "PoolStats", "SequencePages"]
