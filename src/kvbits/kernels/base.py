"""What a kernel backend must do, and the batch that it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvbits.codecs import Scheme
from kvbits.config import PAGE_TOKENS, LayerGeometry
from kvbits.pages import SequencePages
from kvbits.pool import LayerView

SPLIT_PAGES = 16
"""Pages whose partial result is kept apart and merged in order: part of the numerics, so never a tuning knob."""

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class BatchLayout:
    """A step over several sequences whose new tokens are packed into one row dimension, sequence after sequence.

    ``starts``, ``counts`` ``int32 [S]``; ``rows`` ``int32 [S + 1]``, first row of each sequence; ``sealed`` ``int32
    [groups * S, max pages]``, all sequences' pages of one group of layers after those of another (:meth:`frames_of`),
    -1 where there is none or a window has left it behind: it is not read; ``head``, ``tail`` ``int32 [S, open
    frames]``; ``sink`` ``int32 [S, sink frames]``, -1 where the first page is not full, no columns where no sequence
    has one.

    ``draft``: sealed pages are read as drafts (:meth:`kvbits.codecs.Codec.decode_draft`), which takes about half of the
    bytes of ``int8h`` pages and changes nothing for other codecs. What the step stores does not depend on it.

    ``slots``: where each sequence's states of recurrent layers lie (empty: the model has none); ``trails``: where those
    before each of its guessed tokens, its last rows, go.

    ``completes``: whether a sequence completes a page or keeps the page apart that it began in; where none does, the
    step only adds rows to open pages.

    ``again``: a later layer of the model reads the same keys and values and brings them once more (layers that share
    them): the open page stays as it was before the step, so that what is stored does not change then.

    ``shared``: what backends have made of the layout for all layers, by names of theirs. ``static``: the arrays change
    from step to step (:mod:`kvbits.kernels.static`); ``refreshers`` then make ``shared`` follow.
    """

    starts: Ints
    counts: Ints
    rows: Ints
    sealed: Ints
    head: Ints
    tail: Ints
    sink: Ints
    draft: bool = False
    completes: bool = True
    static: bool = False
    slots: tuple[int, ...] = ()
    trails: tuple[tuple[int, ...], ...] = ()
    again: bool = False
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    refreshers: list[Callable[[], None]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, slices: Sequence[SequencePages], draft: bool = False) -> BatchLayout:
        """Pack ``slices``."""
        counts = np.array([s.count for s in slices], dtype=np.int32)
        pages = max((s.start + s.count) // PAGE_TOKENS for s in slices)
        groups = slices[0].groups
        sealed = np.full((groups, len(slices), max(pages, 1)), -1, dtype=np.int32)
        for number, s in enumerate(slices):
            full = (s.start + s.count) // PAGE_TOKENS
            first = 1 if s.sink else 0
            count = max(full - first, 0) * groups
            assert len(s.sealed) >= count, (len(s.sealed), full)
            sealed[:, number, first:full] = np.array(s.sealed[:count], dtype=np.int32).reshape(-1, groups).T
        sink = np.full((len(slices), max(len(s.sink) for s in slices)), -1, dtype=np.int32)
        for row, s in zip(sink, slices, strict=True):
            row[: len(s.sink)] = s.sink
        completes = any(s.start % PAGE_TOKENS + s.count >= PAGE_TOKENS or list(s.head) != list(s.tail) for s in slices)
        return cls(
            starts=np.array([s.start for s in slices], dtype=np.int32),
            counts=counts,
            rows=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            sealed=sealed.reshape(groups * len(slices), -1),
            head=np.array([s.head for s in slices], dtype=np.int32),
            tail=np.array([s.tail for s in slices], dtype=np.int32),
            sink=sink,
            draft=draft,
            slots=tuple(s.slot for s in slices if s.slot >= 0),
            trails=tuple(tuple(s.trail) for s in slices),
            completes=completes,
        )

    @property
    def num_rows(self) -> int:
        return int(self.rows[-1])

    def frames_of(self, view: LayerView) -> Ints:
        """The frames of the sealed pages of ``view``'s layer, ``int32 [S, max pages]``."""
        first = view.sealed.frame * len(self.counts)
        return self.sealed[first : first + len(self.counts)]


class Backend(ABC):
    """Kernels that store and attend, for one device.

    The invariant that every backend keeps: *a token sees its own page in 16 bit and every earlier page as its sealed
    code.* Hence the order inside :meth:`forward`: the step's rows are rounded to bfloat16 and appended, pages that
    they complete are sealed, then the queries attend, earlier pages as codes and their own page in 16 bit.
    """

    name: str

    batch_invariant = True
    """Whether a token's result has the same bits whatever else is in its step."""

    layer_groups = True
    """Whether it reads pages of several groups of layers; else windows are masked and all pages kept."""

    @abstractmethod
    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        """``None``, or the reason why this backend cannot run ``layer`` stored as ``scheme``."""

    def kernels(self, scheme: Scheme, layer: LayerGeometry) -> str:
        """Whose kernels decode ``layer`` stored as ``scheme``, for users to read."""
        return self.name

    graphs = False
    """Whether steps over static layouts can be recorded and replayed by the device."""

    def prepare(self, views: Sequence[LayerView]) -> None:
        """Do now what steps over ``views`` would otherwise wait for, such as compiling; takes seconds at most."""
        return

    @abstractmethod
    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        """Store the step's keys and values and attend.

        ``query`` ``[rows, heads, key_dim]``, ``key`` ``[rows, kv_heads, key_dim]``, ``value`` ``[rows, kv_heads,
        value_dim]``, all bfloat16 or all float32, last dimension contiguous; ``sinks`` ``float32 [heads]`` where the
        layer has them. Returns ``[rows, heads, value_dim]`` in the query's dtype. After the call the pool holds the
        step's tokens: full pages sealed in the frames ``batch.sealed``, the rest in ``batch.tail``.
        """


class Watcher(Backend):
    """Another backend's kernels, whose steps a subclass watches or spoils in its own :meth:`forward`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.layer_groups = backend.layer_groups

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return self._backend.supports(scheme, layer)
