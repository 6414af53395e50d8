"""The page manager's invariants, recounted from the tables alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvbits.pages.allocator import FrameAllocator
from kvbits.pages.prefix import PrefixIndex
from kvbits.pages.stats import PoolStats
from kvbits.pages.table import SequenceTable


def check_invariants(
    tables: Iterable[SequenceTable], allocator: FrameAllocator, index: PrefixIndex, stats: PoolStats
) -> None:
    """Every frame is exactly one of free, open, sealed, cached, and its references are the tables that name it.

    Raises ``AssertionError`` with every term.
    """
    open_refs: Counter[int] = Counter()
    sealed_refs: Counter[int] = Counter()
    for table in tables:
        sealed_refs.update(table.sealed)
        open_refs.update(table.open or ())
        if table.reservation is not None:
            sealed_refs.update(table.reservation.sealed)
            open_refs.update(table.reservation.tail or ())
    free = Counter(allocator.free_frames())
    cached = Counter(frame for page in index.pages() if page.stamp is not None for frame in page.frames)
    problems = []
    for frame in range(allocator.num_frames):
        kinds = {"free": free[frame], "open": open_refs[frame], "sealed": sealed_refs[frame], "cached": cached[frame]}
        roles = [kind for kind, count in kinds.items() if count]
        named = open_refs[frame] + sealed_refs[frame]
        if len(roles) != 1 or free[frame] > 1 or cached[frame] > 1 or named != allocator.refs[frame]:
            problems.append(f"frame {frame}: references {allocator.refs[frame]}, named by {kinds}")
    for page in index.pages():
        if page.stamp is None and any(not sealed_refs[frame] for frame in page.frames):
            problems.append(f"page {page.frames} is indexed as in use, but no table names it as sealed")
    counted = {
        "free": len(free),
        "open": len(open_refs),
        "sealed": len(sealed_refs),
        "cached": len(cached),
        "shared": sum(count > 1 for count in (open_refs + sealed_refs).values()),
    }
    stated = {name: getattr(stats, name) for name in counted}
    if stated != counted:
        problems.append(f"statistics say {stated}, the tables {counted}")
    if problems:
        raise AssertionError("; ".join([*problems, f"all: {counted} of {allocator.num_frames}"]))
