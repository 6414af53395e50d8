"""What a calibration text says about a model: keys, values, and how much an error in each would change the answers.

The measure is the Fisher information. If rows of the cache are off by small errors ``d``, the KL divergence of the
predictions is ``1/2 E[(g . d)^2]``, where ``g`` is the gradient of ``-log p(y)`` by the rows and ``y`` is drawn from
the model's own predictions. One backward pass per window gives ``g`` for every row of every layer at once, so the cost
of any codec in any place follows without running the model again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.calibration.dense import DenseBackend
from kvbits.codecs import PoolLayout, Side, parse_policy
from kvbits.config import PAGE_TOKENS
from kvbits.errors import ConfigError
from kvbits.kernels import BatchLayout, SequenceSlice
from kvbits.models import LoadedModel
from kvbits.pool import PagedPool


@dataclass(frozen=True)
class TensorSample:
    """One layer's keys or values over all windows, page by page.

    ``rows`` and ``gradients`` are ``float32 [pages, kv_heads, 64, dim]``; rows are rounded to bfloat16, as an open page
    holds them. First pages are left out: they are sinks, or no worse than any other.
    """

    layer: int
    side: Side
    rows: Tensor
    gradients: Tensor

    def cost(self, decoded: Tensor) -> Tensor:
        """KL, summed over the scored tokens, of storing ``decoded`` for ``rows``: ``float64 [kv_heads]``."""
        moved = (self.gradients * (decoded - self.rows)).sum(-1).double()
        return moved.square().sum((0, 2)) / 2


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
    parts: list[list[tuple[Tensor, Tensor]]] = []
    queries: list[Tensor] = []
    for window in windows:
        backend, gradients = _backward(loaded, window, generator)
        layers = [backend.windows[i] for i in range(loaded.geometry.num_layers)]
        rows = [x for w in layers for x in (w.key, w.value)]
        parts.append([(_pages(r.bfloat16().float()), _pages(g)) for r, g in zip(rows, gradients, strict=True)])
        moments = [w.queries for w in layers]
        queries = [a + b for a, b in zip(queries, moments, strict=True)] if queries else moments
        progress(context)
    samples = tuple(
        TensorSample(i // 2, "value" if i % 2 else "key", *(torch.cat(pair) for pair in zip(*tensor, strict=True)))
        for i, tensor in enumerate(zip(*parts, strict=True))
    )
    return Statistics(samples, tuple(queries), len(windows) * (context - context // 2))


def _backward(
    loaded: LoadedModel, window: Sequence[int], generator: torch.Generator
) -> tuple[DenseBackend, tuple[Tensor, ...]]:
    policy = parse_policy("bf16", loaded.geometry.num_layers)
    layout = PoolLayout.of(loaded.geometry, policy)
    # Nothing is stored in it: the hook asks the pool for the layers' geometry only.
    pool = PagedPool(loaded.geometry, policy, layout.frames_of(PAGE_TOKENS) * layout.frame_bytes)
    backend = DenseBackend()
    count = len(window)
    step = SequenceSlice(0, count, [0] * (count // PAGE_TOKENS), [0] * layout.open.frames, [0] * layout.open.frames)
    with torch.enable_grad():
        logits = loaded.model(
            input_ids=torch.tensor([list(window)]),
            position_ids=torch.arange(count).unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.arange(count // 2, count),
            kvbits=Forward(pool, backend, BatchLayout.of([step])),
        ).logits[0]
        log_p = torch.log_softmax(logits.float(), dim=-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        loss = -log_p.gather(-1, drawn).sum()
        layers = [backend.windows[i] for i in range(loaded.geometry.num_layers)]
        gradients = torch.autograd.grad(loss, [x for w in layers for x in (w.key_error, w.value_error)])
    return backend, gradients


def _pages(rows: Tensor) -> Tensor:
    """``[tokens, kv_heads, dim]`` to full pages after the first, ``[pages, kv_heads, 64, dim]``."""
    full = len(rows) // PAGE_TOKENS
    pages: Tensor = rows[PAGE_TOKENS : full * PAGE_TOKENS].unflatten(0, (full - 1, PAGE_TOKENS))
    return pages.transpose(1, 2).contiguous()
