"""Where each layer's bytes lie inside a page: pure arithmetic, shared by the pool and the planner.

The pool is an array of equal *frames*. A frame holds exactly one sealed page of one group of layers
(:mod:`kvbits.codecs.groups`): of all layers, where all see equally far. A page in another format, the 16-bit open page
or a first page with more bits, is larger: it takes several frames. These may lie anywhere in the pool, each layer whole
inside one of them; only the open page of a model with several groups, whose frames are small, lies in a run of frames
side by side. So one free list serves every kind of page and nothing fragments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvbits.codecs.base import Scheme
from kvbits.codecs.groups import LayerGroup, cut, kinds_of
from kvbits.codecs.policy import OPEN, Policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry

Tokens = TypeVar("Tokens", int, NDArray[np.int64])

UNBOUNDED = 1 << 40
"""Pages of a sequence that nothing but the model bounds: no layer keeps them all."""

_TYPICAL_TOKENS = 8192
"""Groups are cut so that sessions of so many tokens take the fewest bytes."""


@dataclass(frozen=True)
class Place:
    """A layer's block: ``offset`` bytes from the start of the page's ``frame``-th frame, stored as ``scheme``.

    The block holds one ``scheme.head_bytes(layer)`` after another, one per KV head.
    """

    scheme: Scheme
    frame: int
    offset: int


@dataclass(frozen=True)
class PageLayout:
    """One kind of page: how many frames it takes and where each layer lies."""

    frames: int
    places: tuple[Place, ...]
    used_bytes: int


@dataclass(frozen=True)
class PoolLayout:
    """Frame size and page layouts that follow from a model and a policy.

    A sealed page has one frame for each of ``groups``. ``sink`` is that of a sequence's first page once it is full,
    where it differs from ``sealed``. The open page's frames lie side by side, from a multiple of their number on, where
    ``adjacent``.
    """

    frame_bytes: int
    sealed: PageLayout
    open: PageLayout
    groups: tuple[LayerGroup, ...]
    sink: PageLayout | None = None
    adjacent: bool = False

    @classmethod
    def of(cls, geometry: ModelGeometry, policy: Policy, free_windows: bool = True) -> PoolLayout:
        """The layout for ``policy``; raises ``UnsupportedError`` where a layer does not fit its codec.

        ``free_windows`` false: all layers are one group that keeps every page, for whoever cannot give pages back.
        """
        policy.check(geometry)
        kinds: dict[int | None, tuple[int, ...]] = {None: tuple(range(geometry.num_layers))}
        if free_windows:
            kinds = kinds_of(geometry)
        if len(kinds) > 1:
            return cls._of_groups(geometry, policy, kinds)
        open_schemes = (OPEN,) * geometry.num_layers
        sealed_bytes = sum(_sizes(policy.layers, geometry))
        # A frame must also hold any one layer of a larger page: binds only for models of very few layers.
        frame_bytes = max(sealed_bytes, *_sizes(open_schemes, geometry), *_sizes(policy.sink or (), geometry))
        sink = _place(policy.sink, geometry.layers, frame_bytes) if policy.sink else None
        ((kept, layers),) = kinds.items()
        return cls(
            frame_bytes,
            _place(policy.layers, geometry.layers, frame_bytes),
            _place(open_schemes, geometry.layers, frame_bytes),
            (LayerGroup(layers, kept, sink.frames if sink else 1),),
            sink,
        )

    @classmethod
    def _of_groups(
        cls, geometry: ModelGeometry, policy: Policy, kinds: dict[int | None, tuple[int, ...]]
    ) -> PoolLayout:
        sizes = _sizes(policy.layers, geometry)
        own = _place((OPEN,) * geometry.num_layers, geometry.layers, sum(_sizes((OPEN,) * len(sizes), geometry)))
        tokens = min(geometry.max_position, _TYPICAL_TOKENS)

        def made(frame: int, groups: tuple[LayerGroup, ...]) -> PoolLayout:
            opened = replace(own, frames=-(-own.used_bytes // frame))
            return cls(frame, _grouped(groups, policy.layers, geometry.layers), opened, groups, None, True)

        def cost(frame: int, groups: tuple[LayerGroup, ...]) -> int:
            return frame * (sum(g.pages(tokens // PAGE_TOKENS) for g in groups) - -own.used_bytes // frame)

        frame, groups = cut(kinds, sizes, max(*sizes, *_sizes(policy.sink or (), geometry)), cost)
        if policy.sink is None:
            return made(frame, groups)
        firsts = [
            _place([policy.sink[i] for i in g.layers], [geometry.layers[i] for i in g.layers], frame) for g in groups
        ]
        groups = tuple(replace(g, first_frames=first.frames) for g, first in zip(groups, firsts, strict=True))
        return replace(made(frame, groups), sink=_joined(groups, firsts))

    @property
    def first_frames(self) -> int:
        """Frames of a sequence's first page once it is full."""
        return (self.sink or self.sealed).frames

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in a sealed page of all layers."""
        return self.sealed.used_bytes / PAGE_TOKENS

    @property
    def window_groups(self) -> int:
        """Groups that give pages back."""
        return sum(group.kept is not None for group in self.groups)

    def full_pages(self, frames: int) -> int:
        """Full pages of one sequence that ``frames`` frames let it have beside its open page; -1 when not even that
        fits.

        A page is sealed before older ones are given back.
        """
        if frames < self.open.frames:
            return -1

        def needed(pages: int) -> int:
            held = (g.pages(pages - 1) + 1 for g in self.groups)
            return self.open.frames + (self.first_frames - len(self.groups) + sum(held) if pages else 0)

        if needed(UNBOUNDED) <= frames:
            return UNBOUNDED
        low, high = 0, frames
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(middle) <= frames else (low, middle - 1)
        return low

    def frames_of(self, tokens: Tokens) -> Tokens:
        """Frames that a running sequence of ``tokens`` tokens holds: its full pages, sealed, that the next token sees,
        and one open page.

        Of many sequences at once where ``tokens`` is an array (``int64 [n]``).
        """
        full = tokens // PAGE_TOKENS
        held = full * 0 + self.open.frames
        for group in self.groups:
            first = (full > 0) * (group.first_frames - 1)
            if group.kept is None:
                held += full + first
            else:
                gone = full > group.kept
                held += full - gone * (full - group.kept) + (1 - gone) * first
        return held

    def bytes_of(self, frames: int) -> int:
        """Bytes of ``frames`` frames."""
        return frames * self.frame_bytes

    def session_bytes(self, tokens: int) -> int:
        """Bytes that a running sequence of ``tokens`` tokens holds, its open page included."""
        return self.bytes_of(self.frames_of(tokens))

    def frames_in(self, memory: int) -> int:
        """Frames of a pool of ``memory`` bytes."""
        return memory // self.frame_bytes

    def sessions(self, memory: int, tokens: int) -> int:
        """Running sequences of ``tokens`` tokens that ``memory`` bytes hold at once.

        One of them seals a page before it gives older ones back.
        """
        if tokens > self.longest_context(memory):
            return 0
        full = tokens // PAGE_TOKENS
        passing = sum(g.kept is not None and full > g.kept for g in self.groups)
        return (self.frames_in(memory) - passing) // self.frames_of(tokens)

    def longest_context(self, memory: int) -> int:
        """Tokens of the longest sequence that ``memory`` bytes hold; 0 when not even an open page fits.

        The last page of a running sequence is open and holds at most one token less than a page.
        """
        return max(0, self.full_pages(self.frames_in(memory)) * PAGE_TOKENS + PAGE_TOKENS - 1)

    def effective_bits(self, tokens: int) -> float:
        """Bits per element of a sequence of ``tokens`` tokens: all frames that it holds, open page and padding
        included, over all elements that were stored, given back or not."""
        elements = self.open.used_bytes / 2 / PAGE_TOKENS
        return 8 * self.session_bytes(tokens) / (tokens * elements)

    def pool_bytes(self, sequences: int, tokens: int, step_tokens: int = 512) -> int:
        """Bytes of a pool for ``sequences`` running sequences of ``tokens`` tokens, one frame in 50 to spare.

        A step of ``step_tokens`` tokens takes frames for all pages that it completes before windows give any back.
        """
        frames = (sequences + 1) * self.open.frames + sequences * self.frames_of(tokens)
        frames += self.window_groups * (-(-step_tokens // PAGE_TOKENS) + sequences)
        return self.bytes_of(frames + frames // 50 + 1)


def _sizes(schemes: Sequence[Scheme], geometry: ModelGeometry) -> list[int]:
    """Bytes of each layer's block of a page; of none without ``schemes``."""
    return [scheme.layer_bytes(layer) for scheme, layer in zip(schemes, geometry.layers, strict=bool(schemes))]


def _place(schemes: Sequence[Scheme], layers: Sequence[LayerGeometry], frame_bytes: int) -> PageLayout:
    places = []
    frame = offset = used = 0
    for scheme, layer in zip(schemes, layers, strict=True):
        size = scheme.layer_bytes(layer)
        if offset + size > frame_bytes:
            frame, offset = frame + 1, 0
        places.append(Place(scheme, frame, offset))
        offset += size
        used += size
    return PageLayout(frame + 1, tuple(places), used)


def _grouped(groups: Sequence[LayerGroup], schemes: Sequence[Scheme], layers: Sequence[LayerGeometry]) -> PageLayout:
    """A page whose frames are those of its groups, one each."""
    parts = [_place([schemes[i] for i in g.layers], [layers[i] for i in g.layers], 1 << 62) for g in groups]
    return _joined(groups, parts)


def _joined(groups: Sequence[LayerGroup], parts: Sequence[PageLayout]) -> PageLayout:
    """The parts of a page, the frames of one group after those of another."""
    places: dict[int, Place] = {}
    first = 0
    for group, part in zip(groups, parts, strict=True):
        places |= {i: replace(p, frame=first + p.frame) for i, p in zip(group.layers, part.places, strict=True)}
        first += part.frames
    return PageLayout(first, tuple(places[i] for i in sorted(places)), sum(part.used_bytes for part in parts))
