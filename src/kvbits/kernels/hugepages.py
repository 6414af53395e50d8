"""Huge pages for weights, and another engine's cache, that are already in memory.

A decode step reads every weight once. On 4 KiB pages that costs an address translation for each of them, whose tables
compete with the KV cache for the processor's caches; a layer of a small model is smaller than a huge page, so the
allocator's own alignment does not help. Neighbouring allocations share huge pages here.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_HUGE = 2 << 20
_LEAST = 2 * _HUGE
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
"""``madvise(2)``: allow huge pages, and make them at once (Linux 6.1; older kernels do it in the background)."""


def collapse_to_huge_pages() -> int:
    """Ask Linux to move the process's large private memory to huge pages; returns the bytes for which it agreed.

    Contents and addresses stay. 0 on other systems and where transparent huge pages are off.
    """
    maps = Path("/proc/self/maps")
    if sys.platform != "linux" or not maps.exists():
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for line in maps.read_text().splitlines():
        span, access, _, _, inode, *name = line.split(maxsplit=5)
        if access != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        first, last = (int(x, 16) for x in span.split("-"))
        first, last = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
        if last - first < _LEAST or madvise(first, last - first, _MADV_HUGEPAGE) != 0:
            continue
        madvise(first, last - first, _MADV_COLLAPSE)
        moved += last - first
    return moved
