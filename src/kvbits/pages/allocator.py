"""Free frames and how many sequences name each of the others."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

Frames = tuple[int, ...]


class FrameAllocator:
    """A free list and a reference count per frame.

    A frame without references is not free by itself: the prefix index may keep it, until :meth:`put` returns it.
    """

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames
        self.refs = array("q", bytes(8 * num_frames))
        self.shared = 0
        # A stack, low numbers on top: frames used a moment ago are used again, untouched memory stays untouched.
        self._free = list(range(num_frames - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def free_frames(self) -> Sequence[int]:
        """The free list itself, for checks."""
        return self._free

    def take(self, count: int) -> Frames:
        """``count`` free frames, each with one reference. The caller has made sure that there are enough."""
        assert 0 <= count <= len(self._free), (count, len(self._free))
        frames = tuple(self._free.pop() for _ in range(count))
        self.retain(frames)
        return frames

    def retain(self, frames: Iterable[int]) -> None:
        """One more reference to each of ``frames``."""
        for frame in frames:
            self.refs[frame] += 1
            self.shared += self.refs[frame] == 2

    def release(self, frames: Frames) -> bool:
        """One reference less to each of ``frames``, which are one page; true when nobody names it any more."""
        for frame in frames:
            assert self.refs[frame] > 0, frame
            self.refs[frame] -= 1
            self.shared -= self.refs[frame] == 1
        return self.refs[frames[0]] == 0

    def put(self, frames: Frames) -> None:
        """Return frames without references to the free list."""
        for frame in frames:
            assert self.refs[frame] == 0, (frame, self.refs[frame])
        self._free.extend(reversed(frames))
