"""A fused model is run beside transformers' own code once, on a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.codecs import parse_policy
from kvbits.config import ModelGeometry
from kvbits.kernels import Backend, BatchLayout, SequencePages
from kvbits.pool import PagedPool


@torch.inference_mode()
def both_logits(
    model: Any,
    geometry: ModelGeometry,
    fused: Callable[[Tensor, Tensor, Forward, Tensor], Tensor],
    backend: Backend,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Logits of ``count`` tokens, ``float32 [count, vocabulary]``: of ``fused`` and of transformers' own code, each
    with a small 16-bit cache of its own."""
    ids, positions = _tokens(model, geometry, count)
    fast = fused(ids, positions, _step(model, geometry, backend, count), positions)
    return fast, logits_of(model, geometry, backend, count)


@torch.inference_mode()
def logits_of(model: Any, geometry: ModelGeometry, backend: Backend, count: int) -> Tensor:
    """Logits of ``count`` tokens, ``float32 [count, vocabulary]``, of transformers' own code."""
    ids, positions = _tokens(model, geometry, count)
    found = model(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        logits_to_keep=positions,
        kvbits=_step(model, geometry, backend, count),
    )
    logits: Tensor = found.logits[0].float()
    return logits


def _tokens(model: Any, geometry: ModelGeometry, count: int) -> tuple[Tensor, Tensor]:
    """The same ids and positions each time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(geometry.vocab_size, (count,), generator=generator).to(model.device)
    return ids, torch.arange(count, device=model.device)


def _step(model: Any, geometry: ModelGeometry, backend: Backend, count: int) -> Forward:
    """A step that stores ``count`` tokens as the first of a sequence."""
    pool = PagedPool.smallest(geometry, parse_policy("bf16", geometry.num_layers), model.device)
    own = list(range(pool.layout.open.frames))
    return Forward(pool, backend, BatchLayout.of([SequencePages(0, count, (), own, own)]))
