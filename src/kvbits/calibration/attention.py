"""Causal attention of one window, block by block, with the gradients that a calibration wants.

No matrix of all pairs of tokens is ever held: a block of queries meets the keys that it sees, forward and again
backward (as FlashAttention does: Dao et al., 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from kvbits.config import PAGE_TOKENS, LayerGeometry

_BLOCK = 1 << 19
"""Scores that are held at once, 2 MB of float32, so that they stay in a core's cache; at least a page's of queries."""

Known = tuple[Tensor, Tensor]
"""What an attention over the same rows found: its output and its softmax's logarithms of sums."""


def attention(
    layer: LayerGeometry,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    errors: tuple[Tensor, Tensor],
    sinks: Tensor | None,
    known: Known | None = None,
) -> tuple[Tensor, Known]:
    """Attend from the first token on: ``float32 [tokens, heads, dim]``, ``[tokens, kv_heads, dim]``; returns ``[tokens,
    heads, value_dim]``, and what another run on the same rows may be given as ``known`` and need not compute.

    ``errors`` (keys', values', of the shapes of ``key`` and ``value``) stand for what sealed pages add to the rows that
    later pages read; a token reads its own page without. They are zeros, so only the gradients by them matter.
    """
    groups = query.unflatten(1, (layer.num_kv_heads, -1)).movedim(0, 2)
    rows = [x.movedim(0, 1) for x in (key, value, *errors)]
    if known is None:
        bias = None if sinks is None else sinks.float().view(layer.num_kv_heads, -1, 1, 1)
        with torch.no_grad():
            known = _forward(layer, groups, rows[0], rows[1], bias)
    out: Tensor = _Attention.apply(layer, groups, *rows, *known)  # type: ignore[no-untyped-call]
    return out.movedim(2, 0).flatten(1, 2), known


def _forward(layer: LayerGeometry, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> Known:
    """Shapes as in :class:`_Attention`; the sums' logarithms are ``[kv_heads, group, tokens, 1]``."""
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    total = query.new_empty(*query.shape[:3], 1)
    for rows, seen in _blocks(layer, query):
        scores, _ = _scores(layer, query, key, rows, seen)
        most = scores.amax(-1, keepdim=True)
        if sinks is not None:
            most = torch.maximum(most, sinks)
        weights = scores.sub_(most).exp_()
        norm = weights.sum(-1, keepdim=True)
        if sinks is not None:
            norm += (sinks - most).exp()
        out[:, :, rows] = _apart(_together(weights) @ value[:, seen], query) / norm
        total[:, :, rows] = most + norm.log()
    return out, total


class _Attention(Function):
    """``query`` ``[kv_heads, group, tokens, dim]``; rows ``[kv_heads, tokens, dim]``; their attention is known."""

    @staticmethod
    def forward(
        ctx: Any,
        layer: LayerGeometry,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_error: Tensor,
        value_error: Tensor,
        out: Tensor,
        total: Tensor,
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(query, key, value, out, total)
        return out.view_as(out)  # an input may not be an output

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = slopes
        query, key, value, out, total = ctx.saved_tensors
        layer: LayerGeometry = ctx.layer
        by_query = torch.empty_like(query)
        by_error = [torch.zeros_like(x) for x in (key, value)]
        by_own = [torch.zeros_like(x) for x in (key, value)]
        for rows, seen in _blocks(layer, query):
            scores, bent = _scores(layer, query, key, rows, seen)
            weights = scores.sub_(total[:, :, rows]).exp_()
            asked, received = query[:, :, rows], slope[:, :, rows]
            share = _apart(_together(received) @ value[:, seen].mT, query)
            # the softmax's gradient: a score counts by how far its value's share is from the mean of all
            moved = share.sub_((received * out[:, :, rows]).sum(-1, keepdim=True)).mul_(weights)
            if bent is not None:
                moved.mul_(bent)
            moved.mul_(layer.scale)
            by_query[:, :, rows] = _apart(_together(moved) @ key[:, seen], query)
            parts = ((moved, asked), (weights, received))
            for start in range(rows.start, rows.stop, PAGE_TOKENS):
                page = slice(start, min(start + PAGE_TOKENS, rows.stop))
                here = slice(page.start - rows.start, page.stop - rows.start)
                there = slice(page.start - seen.start, page.stop - seen.start)
                for own, (pairs, given) in zip(by_own, parts, strict=True):
                    own[:, page] = _together(pairs[:, :, here, there]).mT @ _together(given[:, :, here])
                    pairs[:, :, here, there] = 0
            for error, (pairs, given) in zip(by_error, parts, strict=True):
                error[:, seen] += _together(pairs).mT @ _together(given)
        by_key, by_value = (own.add_(error) for own, error in zip(by_own, by_error, strict=True))
        return None, by_query, by_key, by_value, *by_error, None, None


def _blocks(layer: LayerGeometry, query: Tensor) -> Iterator[tuple[slice, slice]]:
    """Whole pages of queries, and the keys that any of them sees."""
    heads, count = query.shape[0] * query.shape[1], query.shape[2]
    reach = min(count, layer.window or count)
    pages = max(1, _BLOCK // (heads * reach * PAGE_TOKENS))
    for start in range(0, count, pages * PAGE_TOKENS):
        stop = min(start + pages * PAGE_TOKENS, count)
        yield slice(start, stop), slice(0 if layer.window is None else max(0, start - layer.window + 1), stop)


def _scores(layer: LayerGeometry, query: Tensor, key: Tensor, rows: slice, seen: slice) -> tuple[Tensor, Tensor | None]:
    """Scores ``[kv_heads, group, rows, seen]``, minus infinity for what is hidden, and the soft cap's derivative."""
    scores = _apart(_together(query[:, :, rows] * layer.scale) @ key[:, seen].mT, query)
    bent = None
    if layer.softcap is not None:
        shape = torch.tanh(scores.div_(layer.softcap))
        scores, bent = layer.softcap * shape, 1 - shape.square()
    position = torch.arange(rows.start, rows.stop, device=query.device).unsqueeze(-1)
    inside = rows.start - seen.start  # earlier keys are later than no query
    later = torch.arange(rows.start, rows.stop, device=query.device) > position
    scores[..., inside:].masked_fill_(later, float("-inf"))
    if layer.window is not None:
        passed = slice(seen.start, max(seen.start, rows.stop - layer.window))
        old = torch.arange(passed.start, passed.stop, device=query.device) <= position - layer.window
        scores[..., : passed.stop - passed.start].masked_fill_(old, float("-inf"))
    return scores, bent


def _together(x: Tensor) -> Tensor:
    """``[kv_heads, group, rows, n]`` to ``[kv_heads, group * rows, n]``: all queries of a KV head in one product."""
    return x.flatten(1, 2)


def _apart(x: Tensor, query: Tensor) -> Tensor:
    """Undo :func:`_together`."""
    apart: Tensor = x.unflatten(1, (query.shape[1], -1))
    return apart
