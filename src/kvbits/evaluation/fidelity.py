"""How far a cache's predictions lie from the 16-bit cache's: one record per scored position, summaries of many.

``KL = sum_v p_ref(v) (log p_ref(v) - log p(v))`` in nats per position, the 16-bit cache being ``ref``; perplexity is
``exp`` of the mean negative log-likelihood of the text's own next tokens. Differences of quantized caches reach down to
1e-5 nats, so everything is computed in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ROWS = 128
"""Rows compared at once: bounds the float64 temporaries (128 x 49,152 x 8 bytes = 50 MB each)."""

Floats = NDArray[np.float64]


@dataclass
class Fidelity:
    """Per-position records of one cache dtype against the 16-bit cache, in the order in which they were added.

    ``positions`` are the tokens' places in their windows, so that results can be split by how much context lay
    before them.
    """

    kl: list[Floats] = field(default_factory=list)
    nll: list[Floats] = field(default_factory=list)
    nll_reference: list[Floats] = field(default_factory=list)
    same_top: list[NDArray[np.bool_]] = field(default_factory=list)
    positions: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, reference: Tensor, logits: Tensor, targets: Tensor, first_position: int = 0) -> None:
        """Record rows ``float32 [rows, vocab]`` of both caches; ``targets`` ``int64 [rows]`` are the next tokens."""
        assert reference.shape == logits.shape == (len(targets), logits.shape[-1]), (reference.shape, logits.shape)
        for start in range(0, len(logits), _ROWS):
            part = slice(start, start + _ROWS)
            log_ref = torch.log_softmax(reference[part].double(), dim=-1)
            log_own = torch.log_softmax(logits[part].double(), dim=-1)
            chosen = targets[part].unsqueeze(-1)
            self.nll_reference.append(-log_ref.gather(-1, chosen).squeeze(-1).numpy())
            self.nll.append(-log_own.gather(-1, chosen).squeeze(-1).numpy())
            self.same_top.append((log_ref.argmax(-1) == log_own.argmax(-1)).numpy())
            divergence = (log_ref.exp() * (log_ref - log_own)).sum(-1)
            # Exact zero is the least KL; the sum over the vocabulary may round to -1e-16.
            self.kl.append(divergence.clamp(min=0).numpy())
            self.positions.append(first_position + np.arange(start, start + len(chosen), dtype=np.int64))

    def extend(self, other: Fidelity) -> None:
        """Append what another record holds."""
        for own, more in zip(self._columns(), other._columns(), strict=True):
            own.extend(more)

    def since(self, position: int) -> Fidelity:
        """The records of the tokens at ``position`` of their windows and after."""
        kept = [p >= position for p in self.positions]
        columns = [[part[k] for part, k in zip(column, kept, strict=True)] for column in self._columns()]
        return Fidelity(*columns)

    def _columns(self) -> tuple[list[NDArray[Any]], ...]:
        columns: tuple[list[Any], ...] = (self.kl, self.nll, self.nll_reference, self.same_top, self.positions)
        return columns

    def as_json(self) -> list[list[Any]]:
        """The records in plain types, a list for each column; :meth:`from_json` reads it."""
        return [np.concatenate(column).tolist() for column in self._columns()]

    @classmethod
    def from_json(cls, columns: list[list[Any]]) -> Fidelity:
        """What :meth:`as_json` gave."""
        kinds: tuple[Any, ...] = (np.float64, np.float64, np.float64, np.bool_, np.int64)
        arrays: list[Any] = [[np.array(column, dtype=kind)] for column, kind in zip(columns, kinds, strict=True)]
        return cls(*arrays)

    def by_position(self, edges: Sequence[int]) -> list[PositionSummary]:
        """Summaries of the tokens at positions ``edges[i]`` to ``edges[i + 1] - 1``; empty stretches are left out."""
        found = []
        for begin, end in itertools.pairwise(edges):
            inside = [(p >= begin) & (p < end) for p in self.positions]
            columns = [[part[k] for part, k in zip(column, inside, strict=True)] for column in self._columns()]
            part = Fidelity(*columns)
            if sum(map(len, part.kl)):
                s = part.summary()
                change = s.perplexity / s.perplexity_16bit - 1
                found.append(PositionSummary(begin, end, s.tokens, s.kl_mean, s.top1_agreement, change))
        return found

    def summary(self) -> FidelitySummary:
        """Summarise everything added so far; at least one row must have been added."""
        assert self.kl, "no rows were compared"
        kl = np.concatenate(self.kl)
        return FidelitySummary(
            tokens=len(kl),
            perplexity=float(np.exp(np.concatenate(self.nll).mean())),
            perplexity_16bit=float(np.exp(np.concatenate(self.nll_reference).mean())),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            kl_max=float(kl.max()),
            top1_agreement=float(np.concatenate(self.same_top).mean()),
        )


@dataclass(frozen=True)
class FidelitySummary:
    """Means over all scored positions; KL in nats, ``top1_agreement`` a fraction of 1."""

    tokens: int
    perplexity: float
    perplexity_16bit: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float


@dataclass(frozen=True)
class PositionSummary:
    """Means over the tokens at positions ``begin`` to ``end - 1``; ``perplexity_change`` is a share of the 16 bit's."""

    begin: int
    end: int
    tokens: int
    kl_mean: float
    top1_agreement: float
    perplexity_change: float
