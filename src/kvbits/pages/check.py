"""The page manager's invariants, recounted from the tables alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from kvbits.pages.allocator import FrameAllocator
from kvbits.pages.groups import GONE, PageShape
from kvbits.pages.prefix import PrefixIndex
from kvbits.pages.stats import PoolStats
from kvbits.pages.table import SequenceTable


def check_invariants(
    tables: Collection[SequenceTable],
    shape: PageShape,
    allocator: FrameAllocator,
    index: PrefixIndex,
    stats: PoolStats,
) -> None:
    """Every frame is exactly one of free, open, sealed, cached, and its references are the tables that name it. Every
    sequence has the pages that its next token sees, and no others.

    Raises ``AssertionError`` with every term.
    """
    open_refs: Counter[int] = Counter()
    sealed_refs: Counter[int] = Counter()
    for table in tables:
        sealed_refs.update(table.held())
        open_refs.update(table.open or ())
        if table.reservation is not None:
            sealed_refs.update(table.reservation.sealed)
            open_refs.update(table.reservation.tail or ())
    free = Counter(allocator.free_frames())
    cached = Counter(frame for page in index.pages() if page.stamp is not None for frame in page.frames)
    problems = [problem for table in tables for problem in _table_problems(table, shape, allocator.run)]
    for frame in range(allocator.num_frames):
        kinds = {"free": free[frame], "open": open_refs[frame], "sealed": sealed_refs[frame], "cached": cached[frame]}
        roles = [kind for kind, count in kinds.items() if count]
        named = open_refs[frame] + sealed_refs[frame]
        if len(roles) != 1 or free[frame] > 1 or cached[frame] > 1 or named != allocator.refs[frame]:
            problems.append(f"frame {frame}: references {allocator.refs[frame]}, named by {kinds}")
    for page in index.pages():
        if page.stamp is None and any(not sealed_refs[frame] for frame in page.frames):
            problems.append(f"page {page.frames} is indexed as in use, but no table names it as sealed")
    if sum(stats.groups) != len(sealed_refs) + len(cached):
        problems.append(f"groups have {stats.groups} frames of {len(sealed_refs)} sealed and {len(cached)} cached")
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


def _table_problems(table: SequenceTable, shape: PageShape, run: int) -> Iterator[str]:
    pages = shape.pages(len(table.sealed))
    kept = set(shape.kept_parts(pages))
    for page in range(pages):
        for group in range(len(shape.groups)):
            frames = table.sealed[shape.part(page, group)]
            if ((page, group) in kept and GONE in frames) or ((page, group) not in kept and set(frames) != {GONE}):
                yield f"group {group} of page {page} of {pages} has the frames {frames}"
    if table.gone != [group.oldest(pages) for group in shape.groups]:
        yield f"of {pages} pages {table.gone} are said to be given back"
    own = [table.open, None if table.reservation is None else table.reservation.tail]
    for opened in own if run > 1 else ():
        if opened is not None and (opened[0] % run or opened != tuple(range(opened[0], opened[0] + run))):
            yield f"the open page's frames are {opened}"
