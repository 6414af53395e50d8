"""The sequences of one cache: which tokens of the padded batch they hold, and their pages, step after step.

transformers sees a rectangle, ``rows`` by ``length`` columns, with a mask for padding. Padding is never stored here: a
row's sequence holds its real tokens only.

While a cache *records its past* (transformers asks for it before it speculates) a step stays open until it is known
which of its tokens stay. Pages that it completes are coded, as tokens behind them must see codes, but their 16-bit rows
are kept beside the codes: a crop goes back to the very rows that were there, and no code is ever decoded into a page.
Windows give pages back when a pass has run, of what stays for good.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from kvbits.config import PAGE_TOKENS
from kvbits.errors import CacheError, OutOfPages, UnsupportedError
from kvbits.hf.store import Part, Store
from kvbits.pages import SequencePages

_TOKEN = 0
"""The page manager wants tokens for its prefix index; a transformers cache is not told them, and has no index."""


P = ParamSpec("P")
T = TypeVar("T")


def _locked(method: Callable[Concatenate[Batch, P], T]) -> Callable[Concatenate[Batch, P], T]:
    """One thread at a time among the caches of a store."""

    @functools.wraps(method)
    def run(self: Batch, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._store.lock:
            return method(self, *args, **kwargs)

    return cast("Callable[Concatenate[Batch, P], T]", run)


@dataclass
class _Sequence:
    """A row's id in the page manager, its tokens that are reserved and not yet committed, and those of the same pass
    before them, which stay whatever comes.
    """

    id: int
    open_tokens: int = 0
    stays: int = 0


class Batch:
    """Rows of one cache on a :class:`Store`."""

    def __init__(self, store: Store, windowed: bool) -> None:
        self._store = store
        self._windowed = windowed
        self._sequences: list[_Sequence] = []
        self._coming: Tensor | None = None
        self._parts: tuple[Part, ...] | None = None
        self._moves = 0
        self.real = torch.ones(0, 0, dtype=torch.bool)
        """``bool [rows, length]``: columns that are tokens, not padding."""

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def length(self) -> int:
        """Columns, padding included."""
        return self.real.shape[1]

    def ids(self) -> list[int]:
        """The rows' sequences in the page manager."""
        return [s.id for s in self._sequences]

    # One forward pass

    @_locked
    def begin(self, rows: int, columns: int, mask: Tensor | None, recording: bool) -> None:
        """Take the pages for ``columns`` more columns, of which ``mask`` ``bool [rows, length + columns]`` are tokens.

        Raises ``CacheError`` for another number of rows or after a pass that failed, ``UnsupportedError`` for a mask
        that hides cached tokens, ``OutOfPages``.
        """
        self._check_whole()
        if self._sequences and rows != len(self):
            raise CacheError(f"the cache holds {len(self)} sequences; the model was called with {rows}")
        coming = self._columns(rows, columns, mask)
        self.settle()
        if not self._sequences:
            self._sequences = [_Sequence(self._store.open()) for _ in range(rows)]
        # A step that may be taken back crosses at most one page boundary: what lies further back is stored for good.
        new = coming[:, -columns:]
        rank = new.cumsum(1)
        final = (rank[:, -1:] - PAGE_TOKENS).clamp(min=0) if recording else torch.zeros_like(rank[:, -1:])
        self._coming, self._parts = coming, None
        self._chosen = new & (rank <= final), new & (rank > final)
        for sequence, stays, count in zip(self._sequences, *(c.sum(1).tolist() for c in self._chosen), strict=True):
            sequence.stays = stays
            if stays:
                self._reserve(sequence, stays, tentative=False)
                self._commit(sequence, stays, defer=True)
            if count:
                self._reserve(sequence, count, tentative=recording)
        self._store.copy_pages()

    def parts(self) -> tuple[Part, ...]:
        """The kernel calls of the pass that has begun, one after another in every layer.

        They are made anew where pages have gone to other frames since; hold the store's lock until they have run.
        """
        if self._parts is None or self._moves != self._store.pages.moves:
            self._moves = self._store.pages.moves
            slices = [(s.stays, self._store.pages.slice(s.id)) for s in self._sequences if s.open_tokens]
            halves = [_before(pages, stays) for stays, pages in slices if stays], [pages for _, pages in slices]
            chosen = zip(halves, self._chosen, strict=True)
            self._parts = tuple(self._store.part(half, _rows(which)) for half, which in chosen if half)
        return self._parts

    @_locked
    def finish(self, recording: bool) -> None:
        """The step of :meth:`begin` has run: windows give back what it has left behind for good."""
        assert self._coming is not None
        self.real, self._coming, self._parts = self._coming, None, None
        if not recording:
            self.settle()
        for sequence in self._sequences:
            self._store.pages.give_back(sequence.id)

    def settle(self) -> None:
        """All tokens of the last step stay."""
        for sequence in self._sequences:
            self._commit(sequence, sequence.open_tokens)

    # The whole batch

    @_locked
    def crop(self, columns: int) -> None:
        """Take back the last ``columns`` columns.

        Raises ``CacheError``, and changes nothing, where that would open a sealed page whose 16-bit rows are gone.
        """
        self._check_whole()
        kept = max(self.length - columns, 0)
        lengths = self.real[:, :kept].sum(1).tolist()
        for row, (sequence, length) in enumerate(zip(self._sequences, lengths, strict=True)):
            least = self._store.pages.length(sequence.id) // PAGE_TOKENS * PAGE_TOKENS
            if 0 < length < least:
                raise CacheError(
                    f"cannot crop row {row} of the cache to {length} tokens: its first {least} are in sealed pages, "
                    "whose 16-bit values are gone. Call cache.activate_past_recording() before the forward pass that "
                    f"may be taken back (of its last {PAGE_TOKENS} tokens), or keep a copy.deepcopy of the cache, "
                    "which shares its pages"
                )
        for sequence, length in zip(self._sequences, lengths, strict=True):
            stored = self._store.pages.length(sequence.id)
            self._commit(sequence, min(max(length - stored, 0), sequence.open_tokens))
            if length == 0:
                self._store.pages.free(sequence.id)
                sequence.id = self._store.open()
            elif length < stored:
                self._store.pages.truncate(sequence.id, length)
        self.real = self.real[:, :kept]

    @_locked
    def select(self, rows: list[int]) -> None:
        """Make row ``i`` what row ``rows[i]`` is; rows that are wanted more than once share their pages."""
        self._check_whole()
        if any(not 0 <= row < len(self) for row in rows):
            raise CacheError(f"rows {rows} were asked for; the cache holds {len(self)} sequences")
        self.settle()
        left = dict(enumerate(self._sequences))
        old = list(self._sequences)
        self._sequences = [left.pop(row) if row in left else _Sequence(self._store.fork(old[row].id)) for row in rows]
        for sequence in left.values():
            self._store.pages.free(sequence.id)
        self.real = self.real[rows]

    @_locked
    def clear(self) -> None:
        """Forget everything, whatever state a failed pass has left."""
        for sequence in self._sequences:
            self._store.pages.free(sequence.id)
        self._sequences.clear()
        self._coming = self._parts = None
        self.real = self.real[:0, :0]

    @_locked
    def fork(self) -> Batch:
        """The same rows once more; all pages are shared."""
        self._check_whole()
        self.settle()
        twin = Batch(self._store, self._windowed)
        twin._sequences = [_Sequence(self._store.fork(s.id)) for s in self._sequences]
        twin.real = self.real
        return twin

    # Internals

    def _check_whole(self) -> None:
        if self._coming is not None:
            raise CacheError("a forward pass through this cache did not come to its end; call cache.reset() first")

    def _columns(self, rows: int, columns: int, mask: Tensor | None) -> Tensor:
        """``bool [rows, length + columns]``: what is real after the step."""
        known = self.real if self._sequences else self.real.new_ones(rows, 0)
        if mask is None:
            mask = known.new_ones(rows, known.shape[1] + columns)
        if mask.shape != (rows, known.shape[1] + columns):
            raise UnsupportedError(
                f"the attention mask has the shape {tuple(mask.shape)}; {rows} rows of {known.shape[1]} cached and "
                f"{columns} new tokens need a padding mask of {(rows, known.shape[1] + columns)}"
            )
        if not torch.equal(mask[:, : known.shape[1]], known):
            raise UnsupportedError(
                "the attention mask differs from the one that the cached tokens were stored with; kvbits cannot hide "
                "or show cached tokens afterwards"
            )
        starts = mask[:, 1:] & ~mask[:, :-1]
        if self._windowed and bool((starts.sum(1) + mask[:, 0] > 1).any()):
            raise UnsupportedError(
                "the attention mask has padding between tokens, and the model has sliding windows, which count it; "
                "pad on the left"
            )
        return mask

    def _reserve(self, sequence: _Sequence, count: int, tentative: bool) -> None:
        try:
            self._store.pages.reserve(sequence.id, count, tentative)
        except OutOfPages as error:
            parts = "; windows give pages back after a pass: read the prompt in parts, generate(prefill_chunk_size=512)"
            raise OutOfPages(
                f"the cache is full: {error}. Give it more kv_cache_memory; reset() or drop caches that share its pages"
                f"{parts if self._store.pages.shape.frees else ''}"
            ) from error
        sequence.open_tokens = count

    def _commit(self, sequence: _Sequence, count: int, defer: bool = False) -> None:
        if sequence.open_tokens:
            self._store.pages.commit(sequence.id, [_TOKEN] * count, defer)
            sequence.open_tokens = 0


def _before(pages: SequencePages, count: int) -> SequencePages:
    """The slice of the ``count`` tokens before those of ``pages``, in the same pass."""
    sink = pages.sink if pages.start >= PAGE_TOKENS else ()
    return replace(pages, start=pages.start - count, count=count, tail=pages.head, sink=sink)


def _rows(chosen: Tensor) -> Tensor | None:
    """Which of ``batch * tokens`` rows ``chosen`` ``bool [batch, tokens]`` are; ``None``: all."""
    return None if bool(chosen.all()) else chosen.flatten().nonzero().squeeze(1)
