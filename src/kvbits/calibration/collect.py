"""What a calibration text says about a model: keys, values, and how much an error in each would change the answers.

The measure is the Fisher information. If rows of the cache are off by small errors ``d``, the KL divergence of the
predictions is ``1/2 E[(g . d)^2]``, where ``g`` is the gradient of ``-log p(y)`` by the rows and ``y`` is drawn from
the model's own predictions. One backward pass per window gives ``g`` for every row of every layer at once, so the cost
of any codec in any place follows without running the model again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbits.calibration.dense import Window, run_dense
from kvbits.codecs import Side
from kvbits.config import PAGE_TOKENS
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel

_LOGIT_ROWS = 128
"""Rows of logits that are turned into gradients at once: 25 MB of float32 for 49,152 words."""


@dataclass(frozen=True)
class TensorSample:
    """One layer's keys or values over all windows, page by page.

    ``rows`` and ``gradients`` are ``bfloat16 [pages, kv_heads, 64, dim]``, the pages of the ``windows`` windows one
    window after another; an open page holds its rows like this too. First pages are left out: they are sinks, or no
    worse than any other.
    """

    layer: int
    side: Side
    rows: Tensor
    gradients: Tensor
    windows: int

    def cost(self, decoded: Tensor) -> Tensor:
        """KL, summed over the scored tokens, of storing ``decoded`` for ``rows``: ``float64 [kv_heads]``.

        ``(sum_t g_t . d_t)^2`` over the tokens of a window is what an error costs, but there are only as many samples
        of it as windows. Were the errors of tokens independent, it would be the sum of the tokens' own squares, of
        which there are thousands. Errors that tokens share (saturated outliers, the equal values of equal tokens in a
        first layer) cost many times that sum; so squares are also taken of whole pages and windows, and what they come
        to beyond chance is added.
        """
        moved = (self.gradients.float() * (decoded - self.rows.float())).sum(-1).double()
        by_page = moved.sum(-1)
        by_window = by_page.unflatten(0, (self.windows, -1)).sum(1)
        cost = moved.square().sum((0, 2))
        for sums in (by_page, by_window):
            # A square of a normal number has twice its squared mean for variance; two deviations are chance.
            chance = 1 + 2 * math.sqrt(2 / len(sums))
            cost = cost + (sums.square().sum(0) - chance * cost).clamp(min=0)
        return cost / 2

    def thinned(self, step: int) -> TensorSample:
        """Every ``step``-th page of each window."""
        rows, gradients = (
            x.unflatten(0, (self.windows, -1))[:, ::step].flatten(0, 1) for x in (self.rows, self.gradients)
        )
        return replace(self, rows=rows, gradients=gradients)


@dataclass(frozen=True)
class Statistics:
    """All samples, keys before values, layer after layer; and how many tokens' predictions were scored.

    ``queries[layer]`` is ``sum q q^T`` of the queries that read each KV head, ``float32 [kv_heads, key_dim, key_dim]``.
    """

    samples: tuple[TensorSample, ...]
    queries: tuple[Tensor, ...]
    scored: int


def collect(
    loaded: LoadedModel,
    windows: Sequence[Sequence[int]],
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Statistics:
    """Run every window (token ids, all of one length) forward and backward; the second half is scored.

    The model should compute in float32. ``progress`` is told the tokens done since its last call. Raises
    ``ConfigError`` for windows of fewer than three pages, which hold too few sealed pages to learn from.
    """
    context = len(windows[0])
    if context < 3 * PAGE_TOKENS:
        raise ConfigError(
            f"calibration windows of {context} tokens are too short; at least {3 * PAGE_TOKENS} are needed"
        )
    generator = torch.Generator().manual_seed(seed)
    pages = context // PAGE_TOKENS - 1
    sides: tuple[Side, Side] = ("key", "value")
    samples = []
    for i, layer in enumerate(loaded.geometry.layers):
        for side, dim in zip(sides, (layer.key_dim, layer.value_dim), strict=True):
            shape = (pages * len(windows), layer.num_kv_heads, PAGE_TOKENS, dim)
            rows, gradients = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(2))
            samples.append(TensorSample(i, side, rows, gradients, len(windows)))
    queries = [torch.zeros(g.num_kv_heads, g.key_dim, g.key_dim) for g in loaded.geometry.layers]
    with _frozen(loaded.model):
        for index, window in enumerate(windows):
            layers, gradients_of = _backward(loaded, window, generator)
            rows_of = [x for w in layers for x in (w.key, w.value)]
            part = slice(index * pages, (index + 1) * pages)
            for sample, row, gradient in zip(samples, rows_of, gradients_of, strict=True):
                sample.rows[part] = _pages(row)
                sample.gradients[part] = _pages(gradient)
            for total, w in zip(queries, layers, strict=True):
                total += w.queries
            progress(context)
    return Statistics(tuple(samples), tuple(queries), len(windows) * (context - context // 2))


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No gradients for the weights: the graph then need not keep what they were multiplied with."""
    learned = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def _backward(
    loaded: LoadedModel, window: Sequence[int], generator: torch.Generator
) -> tuple[list[Window], tuple[Tensor, ...]]:
    with torch.enable_grad():
        logits, layers = run_dense(loaded, window, torch.arange(len(window) // 2, len(window)))
        slopes = torch.cat([_slope(part.detach(), generator) for part in logits.split(_LOGIT_ROWS)])
        errors = [x for w in layers for x in (w.key_error, w.value_error)]
        return layers, torch.autograd.grad(logits, errors, slopes)


def _slope(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of ``-log p(y)`` by ``logits`` ``[rows, vocab]``, one ``y`` drawn for each row."""
    slope = torch.softmax(logits.float(), dim=-1)
    drawn = torch.multinomial(slope, 1, generator=generator)
    slope.scatter_add_(-1, drawn, torch.full(drawn.shape, -1.0))
    return slope.to(logits.dtype)


def _pages(rows: Tensor) -> Tensor:
    """``[tokens, kv_heads, dim]`` to full pages after the first, ``[pages, kv_heads, 64, dim]``."""
    full = len(rows) // PAGE_TOKENS
    pages: Tensor = rows[PAGE_TOKENS : full * PAGE_TOKENS].unflatten(0, (full - 1, PAGE_TOKENS))
    return pages.transpose(1, 2)
