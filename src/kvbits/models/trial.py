"""A model is run in two ways once, on a few tokens at a text's beginning and some of them at the end of its context.

The angles of rotary embeddings turn queries and keys and leave their sizes as they are. So sizes tell what rounding
would hide in the logits: a scale that follows the positions, which code that is run fused does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvbits.attention import Forward
from kvbits.codecs import parse_policy
from kvbits.config import ModelGeometry
from kvbits.kernels import Backend, BatchLayout, SequencePages
from kvbits.kernels.base import Watcher
from kvbits.pool import LayerView, PagedPool

_FAR_TOLERANCE = 0.3
"""Relative difference of a token's logits, the median of all. Far angles round queries and keys more than near ones,
and large keys show it: Qwen2.5-Coder 0.5B has up to 0.08."""

_SIZE_TOLERANCE = 0.05
"""Relative difference of the sizes of a layer's queries, keys or values; SmolLM2, Qwen2.5-Coder and Gemma 3 have up to
0.01, and queries of Ministral 3 0.28."""


@torch.inference_mode()
def disagreement(
    model: Any,
    geometry: ModelGeometry,
    fused: Callable[[Tensor, Tensor, Forward, Tensor], Tensor],
    backend: Backend,
    count: int,
    tolerance: float,
    median: bool = False,
) -> str | None:
    """``None``, or how ``fused`` is not transformers' own code, on ``count`` near tokens and half as many far ones.

    ``tolerance`` is of the near ones' logits (:func:`differences`, with ``median``).
    """
    ids, positions = _tokens(model, geometry, count)
    fast = fused(ids, positions, _step(model, geometry, backend, count), torch.arange(len(ids), device=model.device))
    sizes = _Sizes(backend, count)
    near, far = differences(fast, logits_of(model, geometry, sizes, count), count, median)
    if not sizes.difference < _SIZE_TOLERANCE:
        return f"its queries, keys or values follow their positions, by {sizes.difference:.2g} at the context's end"
    if not near < tolerance:
        return f"its logits differ by {near:.2g} from transformers' own code"
    if not far < _FAR_TOLERANCE:
        return f"its logits differ by {far:.2g} from transformers' own code at the end of its context"
    return None


@torch.inference_mode()
def logits_of(model: Any, geometry: ModelGeometry, backend: Backend, count: int) -> Tensor:
    """Logits of ``count`` near tokens and half as many far ones, ``float32 [count + count // 2, vocabulary]``, of
    transformers' own code, from a small 16-bit cache."""
    ids, positions = _tokens(model, geometry, count)
    found = model(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        logits_to_keep=torch.arange(len(ids), device=model.device),
        kvbits=_step(model, geometry, backend, count),
    )
    logits: Tensor = found.logits[0].float()
    return logits


def differences(found: Tensor, expected: Tensor, count: int, median: bool) -> tuple[float, float]:
    """Relative differences of the logits of ``count`` near tokens, of all or the tokens' ``median``, and of the far
    ones, the median."""
    sides = zip(found.tensor_split([count]), expected.tensor_split([count]), (median, True), strict=True)
    near, far = (
        float(((x - y).norm(dim=1) / y.norm(dim=1)).median() if by_token else (x - y).norm() / y.norm())
        for x, y, by_token in sides
    )
    return near, far


class _Sizes(Watcher):
    """Notes the sizes of what reaches attention for ``count`` near tokens and the far ones."""

    def __init__(self, backend: Backend, count: int) -> None:
        super().__init__(backend)
        self._count = count
        self._found: list[Tensor] = []

    @property
    def difference(self) -> float:
        """The largest relative difference of a layer's."""
        near, far = torch.stack(self._found, dim=1)
        return float(((far - near).abs() / near.clamp(min=torch.finfo(near.dtype).tiny)).max())

    def forward(
        self, view: LayerView, batch: BatchLayout, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        for rows in (query, key, value):
            near, far = rows.float().norm(dim=-1).tensor_split([self._count])
            self._found.append(torch.stack([near[: len(far)].sum(), far.sum()]))
        return self._backend.forward(view, batch, query, key, value, sinks)


def _tokens(model: Any, geometry: ModelGeometry, count: int) -> tuple[Tensor, Tensor]:
    """The same ids and positions each time; the far tokens are the first near ones again."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(geometry.vocab_size, (count,), generator=generator)
    far = torch.arange(count // 2) + max(geometry.max_position - count // 2, 0)
    both = torch.cat([ids, ids[: count // 2]]), torch.cat([torch.arange(count), far])
    return both[0].to(model.device), both[1].to(model.device)


def _step(model: Any, geometry: ModelGeometry, backend: Backend, count: int) -> Forward:
    """A step that stores the near tokens and the far ones as the first of two sequences."""
    pool = PagedPool.smallest(geometry, parse_policy("bf16", geometry.num_layers), model.device, 2)
    frames = torch.arange(2 * pool.layout.open.frames).view(2, -1).tolist()
    counts = count, count // 2
    pages = [SequencePages(0, number, (), own, own) for number, own in zip(counts, frames, strict=True)]
    return Forward(pool, backend, BatchLayout.of(pages))
