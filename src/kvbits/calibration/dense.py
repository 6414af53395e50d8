"""Differentiable attention over one window, with the place where a cache's errors would enter."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvbits.codecs import Scheme
from kvbits.config import PAGE_TOKENS, LayerGeometry
from kvbits.kernels import Backend, BatchLayout
from kvbits.pool import LayerView


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
        # The weights of all heads are tokens x tokens: computed again in the backward pass rather than kept.
        out: Tensor = checkpoint(
            _attention,
            view.geometry,
            query.float(),
            key,
            value,
            window.key_error,
            window.value_error,
            sinks,
            use_reentrant=False,
        )
        return out.to(query.dtype)


def _attention(
    layer: LayerGeometry,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_error: Tensor,
    value_error: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    position = torch.arange(len(query))
    distance = position[:, None] - position[None, :]
    hidden = distance < 0
    if layer.window is not None:
        hidden |= distance >= layer.window
    earlier = (position[:, None] // PAGE_TOKENS) != (position[None, :] // PAGE_TOKENS)
    outputs = []
    for head in range(layer.num_heads):
        kv = head // layer.group_size
        q = query[:, head] * layer.scale
        scores = q @ key[:, kv].T + (q @ key_error[:, kv].T) * earlier
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].float().expand(len(query), 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[:, : len(key)]
        outputs.append(weights @ value[:, kv] + (weights * earlier) @ value_error[:, kv])
    return torch.stack(outputs, dim=1)
