"""Gradients by a cache's errors as anyone would write them: autograd over the whole model, all pairs of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbits.calibration.dense import dense_step
from kvbits.codecs import Scheme
from kvbits.config import LayerGeometry
from kvbits.kernels import Backend, BatchLayout
from kvbits.models import LoadedModel
from kvbits.pool import LayerView


@dataclass
class PlainBackend(Backend):
    """Attention with ``errors`` (of a layer's keys and values, by its index) in all pages but a token's own."""

    name = "plain"
    errors: Mapping[int, tuple[Tensor, Tensor]]
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return None

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        layer = view.geometry
        self.rows[view.index] = key.detach(), value.detach()
        key_error, value_error = self.errors.get(view.index, (torch.zeros_like(key), torch.zeros_like(value)))
        place = torch.arange(len(query))
        distance = place[:, None] - place
        own = place[:, None] // 64 == place // 64
        outputs = []
        for head in range(layer.num_heads):
            kv = head // layer.group_size
            q = query[:, head]
            scores = torch.where(own, q @ key[:, kv].T, q @ (key + key_error)[:, kv].T) * layer.scale
            if layer.softcap is not None:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            visible = distance >= 0
            if layer.window is not None:
                visible = visible & (distance < layer.window)
            scores = scores.masked_fill(~visible, float("-inf"))
            extra = torch.empty(len(q), 0) if sinks is None else sinks[head].expand(len(q), 1)
            weights = torch.softmax(torch.cat([scores, extra], -1), -1)[:, : len(q)]
            outputs.append(weights @ value[:, kv] + (weights * ~own) @ value_error[:, kv])
        return torch.stack(outputs, 1)


def plain_logits(loaded: LoadedModel, window: list[int], backend: Backend) -> Tensor:
    """All logits of ``window``, ``[tokens, vocab]``."""
    step = dense_step(loaded, backend, len(window))
    ids, positions = torch.tensor([window]), torch.arange(len(window)).unsqueeze(0)
    return loaded.model(input_ids=ids, position_ids=positions, use_cache=False, kvbits=step).logits[0]


def plain_gradients(
    loaded: LoadedModel, window: list[int], seed: int = 0
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Rows of every layer (keys, values) ``[tokens, kv_heads, dim]``, and the gradients of minus the log-probability of
    drawn labels of the second half by an error in each."""
    errors = {
        i: tuple(torch.zeros(len(window), g.num_kv_heads, dim, requires_grad=True) for dim in (g.key_dim, g.value_dim))
        for i, g in enumerate(loaded.geometry.layers)
    }
    backend = PlainBackend(errors)
    with torch.enable_grad():
        logits = plain_logits(loaded, window, backend)[len(window) // 2 :].log_softmax(-1)
        labels = torch.multinomial(logits.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
        loss = -logits.gather(-1, labels).sum()
        found = torch.autograd.grad(loss, [e for pair in errors.values() for e in pair])
    return [backend.rows[i] for i in errors], list(zip(found[::2], found[1::2], strict=True))


def pages_of(rows: Tensor) -> Tensor:
    """Full pages after the first, ``[pages, kv_heads, 64, dim]``, written out page by page."""
    return torch.stack([rows[start : start + 64].transpose(0, 1) for start in range(64, len(rows) - 63, 64)])
