"""Sealed pages by what they hold: a chain of content hashes, and the order in which idle pages are given up.

A page's hash covers its tokens and the hash of the page before it, back to a root that covers the policy, the model,
the salt and the page size. So equal hashes mean equal history, and the index needs no tree of pointers: a lookup walks
the chain until a hash is missing.

A page is *idle* when no sequence names it. Idle pages are given up least recently used first, leaves first: a page goes
only when no idle page continues it. (A page in use may outlive the page before it, where two sequences computed the
same text side by side and only the first copy was indexed; it is found again when that page is.) Where layers form
several groups each has its part of a page, a page of its own here; one of a sliding window is of use without those
before it, and goes by its age alone.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvbits.pages.allocator import Frames


@dataclass
class CachedPage:
    """An indexed sealed page. ``stamp`` is the time when it became idle, or ``None`` while it is in use.

    ``parent``: the page that it continues and must not outlive; empty where there is none.
    """

    hash: bytes
    parent: bytes
    depth: int
    frames: Frames
    stamp: int | None = None


class PageHasher:
    """Hashes of pages of ``page_tokens`` tokens; ``cache_key`` separates caches whose bytes differ."""

    def __init__(self, page_tokens: int, cache_key: bytes) -> None:
        self.page_tokens = page_tokens
        self._cache_key = cache_key

    def root(self, salt: bytes, generation: int) -> bytes:
        """The hash before the first page."""
        digest = hashlib.blake2b(digest_size=32, person=b"kvbits-prefix")
        for part in (self._cache_key, salt, self.page_tokens.to_bytes(8, "little"), generation.to_bytes(8, "little")):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()

    def page(self, parent: bytes, tokens: array[int]) -> bytes:
        """The hash of the page that holds ``tokens`` (64-bit integers) after ``parent``."""
        assert len(tokens) == self.page_tokens, len(tokens)
        return hashlib.blake2b(parent + tokens.tobytes(), digest_size=32).digest()

    def chain(self, parent: bytes, tokens: Sequence[int], pages: int, first: int = 0) -> Iterator[bytes]:
        """The hashes of the pages ``first`` to ``pages - 1`` of ``tokens``; ``parent`` is the hash before them."""
        size = self.page_tokens
        for start in range(first * size, pages * size, size):
            parent = self.page(parent, array("q", tokens[start : start + size]))
            yield parent


class PrefixIndex:
    """Indexed pages by hash and by frame, and the queue of idle ones."""

    def __init__(self) -> None:
        self.idle = 0
        self.idle_frames = 0
        self._by_hash: dict[bytes, CachedPage] = {}
        self._by_frame: dict[int, CachedPage] = {}
        self._idle_children: Counter[bytes] = Counter()
        self._clock = 0
        self._heap: list[tuple[int, int, bytes]] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_hash

    def get(self, key: bytes) -> CachedPage | None:
        return self._by_hash.get(key)

    def at(self, frame: int) -> CachedPage | None:
        """The page whose first frame is ``frame``."""
        return self._by_frame.get(frame)

    def pages(self) -> Iterator[CachedPage]:
        return iter(self._by_hash.values())

    def insert(self, page: CachedPage) -> None:
        """Index a page that is in use and whose hash is new."""
        assert page.hash not in self._by_hash, page
        assert page.stamp is None, page
        self._by_hash[page.hash] = page
        self._by_frame[page.frames[0]] = page

    def move(self, moves: Mapping[int, int]) -> None:
        """Frames have become others."""
        for page in self._by_hash.values():
            if not moves.keys().isdisjoint(page.frames):
                del self._by_frame[page.frames[0]]
                page.frames = tuple(moves.get(frame, frame) for frame in page.frames)
                self._by_frame[page.frames[0]] = page

    def tick(self) -> None:
        """Let time pass: pages that become idle between two ticks are equally old."""
        self._clock += 1

    def make_idle(self, page: CachedPage) -> None:
        """No sequence names ``page`` any more."""
        assert page.stamp is None, page
        page.stamp = self._clock
        self.idle += 1
        self.idle_frames += len(page.frames)
        self._idle_children[page.parent] += 1
        self._offer(page)

    def make_used(self, page: CachedPage) -> None:
        """A sequence names ``page``, which was idle."""
        assert page.stamp is not None, page
        self._leave_queue(page)
        page.stamp = None

    def oldest(self) -> CachedPage:
        """The idle page to give up next; there must be one."""
        while True:
            stamp, _, key = self._heap[0]
            page = self._by_hash.get(key)
            if page is not None and page.stamp == stamp and not self._idle_children[key]:
                return page
            heapq.heappop(self._heap)

    def remove(self, page: CachedPage) -> None:
        """Forget ``page``, idle or in use."""
        del self._by_hash[page.hash]
        del self._by_frame[page.frames[0]]
        if page.stamp is not None:
            self._leave_queue(page)

    def _leave_queue(self, page: CachedPage) -> None:
        self.idle -= 1
        self.idle_frames -= len(page.frames)
        self._idle_children[page.parent] -= 1
        if self._idle_children[page.parent]:
            return
        del self._idle_children[page.parent]
        parent = self._by_hash.get(page.parent)
        if parent is not None and parent.stamp is not None:
            self._offer(parent)

    def _offer(self, page: CachedPage) -> None:
        assert page.stamp is not None, page
        if page.hash in self._idle_children:
            return
        # Entries that no longer hold are skipped when met; when they are the most, the queue is built anew.
        if len(self._heap) > 2 * self.idle + 64:
            self._heap = [
                _entry(p, p.stamp)
                for p in self._by_hash.values()
                if p.stamp is not None and p.hash not in self._idle_children
            ]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, _entry(page, page.stamp))


def _entry(page: CachedPage, stamp: int) -> tuple[int, int, bytes]:
    return stamp, -page.depth, page.hash
