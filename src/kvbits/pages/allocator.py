"""Free frames and how many sequences name each of the others."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

Frames = tuple[int, ...]


class FrameAllocator:
    """A free list and a reference count per frame.

    A frame without references is not free by itself: the prefix index may keep it, until :meth:`put` returns it.

    Frames are taken for one of ``kinds`` of use, which :attr:`counts` counts.

    ``run``: so many frames side by side, from a multiple of ``run`` on, can be had at once (:meth:`take_run`). Single
    frames come from runs that are broken already, as long as there are any.
    """

    def __init__(self, num_frames: int, run: int = 1, kinds: int = 1) -> None:
        self.num_frames = num_frames
        self.run = run
        self.refs = array("q", bytes(8 * num_frames))
        self.shared = 0
        self.counts = [0] * kinds
        self._kinds = array("H", bytes(2 * num_frames))
        self.free = num_frames
        whole = num_frames // run
        # A stack, low numbers on top: frames used a moment ago are used again, untouched memory stays untouched.
        self._whole = list(range(whole - 1, -1, -1))
        # Runs with some free frames, the last broken one last; those beyond the last run belong to a short one.
        self._broken: dict[int, list[int]] = {}
        if num_frames % run:
            self._broken[whole] = list(range(num_frames - 1, whole * run - 1, -1))

    def free_frames(self) -> Sequence[int]:
        """The free frames, for checks."""
        broken = [frame for frames in self._broken.values() for frame in frames]
        return broken + [frame for number in self._whole for frame in self._frames(number)]

    def take(self, count: int, kind: int = 0) -> Frames:
        """``count`` free frames, each with one reference. The caller has made sure that there are enough."""
        assert 0 <= count <= self.free, (count, self.free)
        self.free -= count
        if self.run == 1:
            frames = tuple(self._whole.pop() for _ in range(count))
        else:
            frames = tuple(self._single() for _ in range(count))
        self._begin(frames, kind)
        return frames

    def take_run(self, kind: int = 0) -> Frames:
        """``run`` free frames side by side, each with one reference; :meth:`free_run` has made sure of them."""
        frames = tuple(self._frames(self._whole.pop()))
        self.free -= self.run
        self._begin(frames, kind)
        return frames

    def free_run(self) -> dict[int, int]:
        """Make a whole run free, for which ``run`` frames must be: which frames became which others, bytes apart.

        Empty where one is free anyway. References go along. Runs are taken whole, so none of them is broken for it.
        """
        assert self.free >= self.run, (self.free, self.run)
        if self._whole:
            return {}
        short = self.num_frames // self.run
        number = max((n for n in self._broken if n != short), key=lambda n: len(self._broken[n]))
        vacant = self._broken.pop(number)
        moves = {frame: self._single() for frame in sorted(set(self._frames(number)) - set(vacant))}
        for source, target in moves.items():
            self.refs[source], self.refs[target] = 0, self.refs[source]
            self._kinds[target] = self._kinds[source]
        self._whole.append(number)
        return moves

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
            self.counts[self._kinds[frame]] -= 1
        self.free += len(frames)
        if self.run == 1:
            self._whole.extend(reversed(frames))
            return
        for frame in reversed(frames):
            number = frame // self.run
            vacant = self._broken.setdefault(number, [])
            vacant.append(frame)
            if len(vacant) == self.run:
                del self._broken[number]
                self._whole.append(number)

    def _begin(self, frames: Frames, kind: int) -> None:
        self.counts[kind] += len(frames)
        for frame in frames:
            self._kinds[frame] = kind
        self.retain(frames)

    def _frames(self, run: int) -> Iterator[int]:
        return iter(range(run * self.run, (run + 1) * self.run))

    def _single(self) -> int:
        if not self._broken:
            number = self._whole.pop()
            self._broken[number] = list(self._frames(number))[::-1]
        number = next(reversed(self._broken))
        vacant = self._broken[number]
        frame = vacant.pop()
        if not vacant:
            del self._broken[number]
        return frame
