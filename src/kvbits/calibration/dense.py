"""Differentiable attention over one window, with the place where a cache's errors would enter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from kvbits.attention import Forward
from kvbits.codecs import Scheme, parse_policy
from kvbits.config import PAGE_TOKENS, LayerGeometry
from kvbits.kernels import Backend, BatchLayout
from kvbits.models import LoadedModel
from kvbits.pages import SequencePages
from kvbits.pool import LayerView, PagedPool


@dataclass
class Window:
    """One layer's rows of a window: ``key``, ``value`` ``float32 [tokens, kv_heads, dim]`` as attention saw them.

    ``key_error`` and ``value_error`` are zeros of the same shapes that stand for what a sealed page adds to a row; the
    gradient by them is what :mod:`kvbits.calibration.collect` wants. ``queries`` ``float32 [kv_heads, key_dim,
    key_dim]`` is the sum of ``q q^T`` over all queries that read a KV head.
    """

    key: Tensor
    value: Tensor
    key_error: Tensor
    value_error: Tensor
    queries: Tensor


@dataclass
class DenseBackend(Backend):
    """Plain causal attention of one sequence from its first token, nothing stored.

    A token reads rows of earlier pages with their ``*_error`` added and rows of its own page without: the errors enter
    exactly where a sealed page's codes would.
    """

    name = "dense"
    windows: dict[int, Window] = field(default_factory=dict)

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return None

    def errors(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Where the differentiation happens: no error at all. ``index`` is the layer."""
        return torch.zeros_like(key), torch.zeros_like(value)

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        assert len(batch.counts) == 1, batch.counts
        assert batch.starts[0] == 0, batch.starts
        key, value = key.float(), value.float()
        key_error, value_error = self.errors(view.index, key, value)
        shared = query.detach().float().unflatten(1, (view.geometry.num_kv_heads, -1))
        window = Window(
            key=key.detach(),
            value=value.detach(),
            key_error=key_error.requires_grad_(torch.is_grad_enabled()),
            value_error=value_error.requires_grad_(torch.is_grad_enabled()),
            queries=torch.einsum("tkgc,tkgd->kcd", shared, shared),
        )
        self.windows[view.index] = window
        heads = [
            # The weights of a head are tokens x tokens: computed again in the backward pass rather than kept.
            checkpoint(
                _attention,
                view.geometry,
                query[:, kv * view.geometry.group_size : (kv + 1) * view.geometry.group_size].float(),
                key[:, kv],
                value[:, kv],
                window.key_error[:, kv],
                window.value_error[:, kv],
                None if sinks is None else sinks[kv * view.geometry.group_size : (kv + 1) * view.geometry.group_size],
                use_reentrant=False,
            )
            for kv in range(view.geometry.num_kv_heads)
        ]
        return torch.cat(heads, dim=1).to(query.dtype)


def run_dense(loaded: LoadedModel, window: Sequence[int], wanted: Tensor) -> tuple[Tensor, list[Window]]:
    """Logits ``[rows, vocab]`` of the rows ``wanted`` (``int64 [rows]``) of ``window`` (token ids), and every layer's
    rows; with gradients where they are enabled."""
    # Nothing is stored in it: the hook asks the pool for the layers' geometry only.
    pool = PagedPool.smallest(loaded.geometry, parse_policy("bf16", loaded.geometry.num_layers))
    backend = DenseBackend()
    count, frames = len(window), (0,) * pool.layout.open.frames
    step = SequencePages(0, count, [0] * (count // PAGE_TOKENS), frames, frames)
    logits: Tensor = loaded.model(
        input_ids=torch.tensor([list(window)]),
        position_ids=torch.arange(count).unsqueeze(0),
        use_cache=False,
        logits_to_keep=wanted,
        kvbits=Forward(pool, backend, BatchLayout.of([step])),
    ).logits[0]
    return logits, [backend.windows[i] for i in range(loaded.geometry.num_layers)]


def _attention(
    layer: LayerGeometry,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_error: Tensor,
    value_error: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """``[tokens, group, dim]`` queries of one KV head, its rows ``[tokens, dim]``; returns ``[tokens, group, dim]``.

    Errors are added everywhere and taken out of the blocks in which a page reads itself: a mask over all pairs of
    tokens would cost as much as attention.
    """
    count = len(query)
    spare = -count % PAGE_TOKENS  # rows that no query of the window sees, and queries that are dropped
    query = pad(query, (0, 0, 0, 0, 0, spare))
    key, value, key_error, value_error = (pad(x, (0, 0, 0, spare)) for x in (key, value, key_error, value_error))
    position = torch.arange(len(query))
    distance = position[:, None] - position[None, :]
    hidden = distance < 0
    if layer.window is not None:
        hidden |= distance >= layer.window
    outputs = []
    for head in range(query.shape[1]):
        q = query[:, head] * layer.scale
        own = q.unflatten(0, (-1, PAGE_TOKENS)) @ key_error.unflatten(0, (-1, PAGE_TOKENS)).transpose(1, 2)
        scores = q @ (key + key_error).T
        _own_pages(scores).sub_(own.permute(1, 2, 0))
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].float().expand(len(query), 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[:, : len(key)]
        inside = _own_pages(weights).permute(2, 0, 1) @ value_error.unflatten(0, (-1, PAGE_TOKENS))
        outputs.append((weights @ (value + value_error) - inside.flatten(0, 1))[:count])
    return torch.stack(outputs, dim=1)


def _own_pages(pairs: Tensor) -> Tensor:
    """The blocks of ``[tokens, tokens]`` in which a page meets itself, ``[64, 64, pages]``: a view."""
    blocks = pairs.unflatten(0, (-1, PAGE_TOKENS)).unflatten(2, (-1, PAGE_TOKENS))
    own: Tensor = blocks.diagonal(dim1=0, dim2=2)
    return own
