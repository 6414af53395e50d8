"""The pool as a picture: one letter a frame."""

from __future__ import annotations

from collections.abc import Iterable

from kvbits.pages.allocator import FrameAllocator
from kvbits.pages.prefix import PrefixIndex
from kvbits.pages.table import SequenceTable

FREE, OPEN, SEALED, SHARED, CACHED = b".osxc"
"""What a frame is; ``SHARED`` is sealed (or open) with more than one owner."""


def frame_map(tables: Iterable[SequenceTable], allocator: FrameAllocator, index: PrefixIndex) -> bytes:
    """One of the letters above for each frame, in the order of the pool."""
    found = bytearray([FREE]) * allocator.num_frames
    for page in index.pages():
        if page.stamp is not None:
            for frame in page.frames:
                found[frame] = CACHED
    for table in tables:
        step = table.reservation
        for frame in (*table.held(), *(step.sealed if step is not None else ())):
            found[frame] = SHARED if allocator.refs[frame] > 1 else SEALED
        for frame in (*(table.open or ()), *((step.tail or ()) if step is not None else ())):
            found[frame] = SHARED if allocator.refs[frame] > 1 else OPEN
    return bytes(found)
