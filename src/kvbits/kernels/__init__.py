"""Attention on coded pages: the backend interface and its implementations."""

from kvbits.kernels.base import SPLIT_PAGES, Backend, BatchLayout, SequenceSlice

__all__ = ["SPLIT_PAGES", "Backend", "BatchLayout", "SequenceSlice"]
