"""Where each layer's bytes lie inside a page: pure arithmetic, shared by the pool and the planner.

The pool is an array of equal *frames*. A frame holds exactly one sealed page (all layers of 64 tokens). A page in
another format, the 16-bit open page or a first page with more bits, is larger: it takes several frames, anywhere in the
pool, and each layer lies whole inside one of them. So one free list serves every kind of page and nothing fragments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvbits.codecs.base import Scheme
from kvbits.codecs.policy import OPEN, Policy
from kvbits.config import PAGE_TOKENS, LayerGeometry, ModelGeometry

Tokens = TypeVar("Tokens", int, NDArray[np.int64])


@dataclass(frozen=True)
class Place:
    """A layer's block: in the page's ``frame``-th frame, ``offset`` bytes from its start, stored as ``scheme``.

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

    ``sink`` is that of a sequence's first page once it is full, where it differs from ``sealed``.
    """

    frame_bytes: int
    sealed: PageLayout
    open: PageLayout
    sink: PageLayout | None = None

    @classmethod
    def of(cls, geometry: ModelGeometry, policy: Policy) -> PoolLayout:
        """The layout for ``policy``; raises ``UnsupportedError`` where a layer does not fit its codec."""
        policy.check(geometry)
        open_schemes = (OPEN,) * geometry.num_layers
        sealed_bytes = sum(s.layer_bytes(g) for s, g in zip(policy.layers, geometry.layers, strict=True))
        # A frame must also hold any one layer of a larger page: binds only for models of very few layers.
        larger = [*zip(open_schemes, geometry.layers, strict=True)]
        larger += zip(policy.sink, geometry.layers, strict=True) if policy.sink else ()
        frame_bytes = max(sealed_bytes, *(s.layer_bytes(g) for s, g in larger))
        return cls(
            frame_bytes,
            _place(policy.layers, geometry.layers, frame_bytes),
            _place(open_schemes, geometry.layers, frame_bytes),
            _place(policy.sink, geometry.layers, frame_bytes) if policy.sink else None,
        )

    @property
    def first_frames(self) -> int:
        """Frames of a sequence's first page once it is full."""
        return (self.sink or self.sealed).frames

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in a sealed page."""
        return self.sealed.used_bytes / PAGE_TOKENS

    def full_pages(self, frames: int) -> int:
        """Full pages of one sequence that ``frames`` frames hold beside its open page; -1 when not even that fits."""
        rest = frames - self.open.frames
        if rest < self.first_frames:
            return -1 if rest < 0 else 0
        return 1 + (rest - self.first_frames) // self.sealed.frames

    def frames_of(self, tokens: Tokens) -> Tokens:
        """Frames that a running sequence of ``tokens`` tokens holds: its full pages sealed, and one open page.

        Of many sequences at once where ``tokens`` is an array (``int64 [n]``).
        """
        full = tokens // PAGE_TOKENS
        first = (full > 0) * (self.first_frames - self.sealed.frames)
        return full * self.sealed.frames + first + self.open.frames

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
        """Running sequences of ``tokens`` tokens that ``memory`` bytes hold at once."""
        return self.frames_in(memory) // self.frames_of(tokens)

    def longest_context(self, memory: int) -> int:
        """Tokens of the longest sequence that ``memory`` bytes hold; 0 when not even an open page fits.

        The last page of a running sequence is open and holds at most one token less than a page.
        """
        return max(0, self.full_pages(self.frames_in(memory)) * PAGE_TOKENS + PAGE_TOKENS - 1)

    def effective_bits(self, tokens: int) -> float:
        """Bits per element over all frames that a sequence of ``tokens`` tokens holds, open page included."""
        elements = self.open.used_bytes / 2 / PAGE_TOKENS
        return 8 * self.session_bytes(tokens) / (tokens * elements)

    def pool_bytes(self, sequences: int, tokens: int) -> int:
        """Bytes of a pool for ``sequences`` running sequences of ``tokens`` tokens, one frame in 50 to spare."""
        frames = (sequences + 1) * self.open.frames + sequences * self.frames_of(tokens)
        return self.bytes_of(frames + frames // 50 + 1)


def _place(schemes: tuple[Scheme, ...], layers: tuple[LayerGeometry, ...], frame_bytes: int) -> PageLayout:
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
