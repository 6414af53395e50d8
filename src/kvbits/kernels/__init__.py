"""Attention on coded pages: the backend interface and its implementations."""

from kvbits.kernels.base import SPLIT_PAGES, Backend, BatchLayout, SequenceSlice

__all__ = ["SPLIT_PAGES", "Backend", "BatchLayout", "SequenceSlice", "default_backend"]


def default_backend() -> Backend:
    """The fastest backend of this machine, a new instance for each engine."""
    # Not at the top: importing kvbits must not load the native library.
    from kvbits.kernels.cpu import CpuBackend

    return CpuBackend()
