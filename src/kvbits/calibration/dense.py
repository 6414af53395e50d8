"""Differentiable attention over one window, with the place where a cache's errors would enter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.calibration.attention import Known, attention
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
    exactly where a sealed page's codes would. ``windows`` has what layers saw, by their index, where it ``keeps`` that.
    Where there are ``known`` results, a layer's first run leaves its own there, and its second takes them.
    """

    name = "dense"
    keeps: bool = True
    windows: dict[int, Window] = field(default_factory=dict)
    known: dict[int, Known] | None = None

    def supports(self, scheme: Scheme, layer: LayerGeometry) -> str | None:
        return None

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        assert len(batch.counts) == 1, batch.counts
        assert batch.starts[0] == 0, batch.starts
        key, value = key.float(), value.float()
        wanted = torch.is_grad_enabled()
        errors = torch.zeros_like(key, requires_grad=wanted), torch.zeros_like(value, requires_grad=wanted)
        if self.keeps:
            shared = query.detach().float().unflatten(1, (view.geometry.num_kv_heads, -1))
            moment = torch.einsum("tkgc,tkgd->kcd", shared, shared)
            self.windows[view.index] = Window(key.detach(), value.detach(), *errors, moment)
        known = None if self.known is None else self.known.pop(view.index, None)
        out, found = attention(view.geometry, query.float(), key, value, errors, sinks, known)
        if self.known is not None and known is None:
            self.known[view.index] = found
        return out.to(query.dtype).contiguous()  # as other backends give it: some layers take views


def dense_step(loaded: LoadedModel, backend: Backend, count: int) -> Forward:
    """How a model's layers read a window of ``count`` tokens through ``backend``, which stores nothing."""
    # the hook asks the pool for the layers' geometry only.
    pool = PagedPool.smallest(loaded.geometry, parse_policy("bf16", loaded.geometry.num_layers))
    frames = (0,) * pool.layout.open.frames
    pages = SequencePages(0, count, [0] * (count // PAGE_TOKENS), frames, frames)
    return Forward(pool, backend, BatchLayout.of([pages]))


def model_inputs(loaded: LoadedModel, window: Sequence[int]) -> dict[str, object]:
    """What a model is called with to read ``window`` (token ids) from its first token on."""
    return {
        "input_ids": torch.tensor([list(window)]).to(loaded.device),
        "position_ids": torch.arange(len(window), device=loaded.device).unsqueeze(0),
        "use_cache": False,
    }


def run_dense(loaded: LoadedModel, window: Sequence[int]) -> list[Window]:
    """Every layer's rows of ``window`` (token ids), all at once; without gradients."""
    backend = DenseBackend()
    with torch.no_grad():
        last = torch.arange(len(window) - 1, len(window)).to(loaded.device)
        step = dense_step(loaded, backend, len(window))
        loaded.model(**model_inputs(loaded, window), logits_to_keep=last, kvbits=step)
    return [backend.windows[i] for i in range(loaded.geometry.num_layers)]
