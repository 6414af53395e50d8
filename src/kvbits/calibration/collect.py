"""What a calibration text says about a model: keys, values, and how much an error in each would change the answers.

The measure is the Fisher information. If rows of the cache are off by small errors ``d``, the KL divergence of the
predictions is ``1/2 E[(g . d)^2]``, where ``g`` is the gradient of ``-log p(y)`` by the rows and ``y`` is drawn from
the model's own predictions. One backward pass per window gives ``g`` for every row of every layer, so the cost of any
codec in any place follows without running the model again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from kvbits.calibration.goal import check_context
from kvbits.calibration.layerwise import Layers
from kvbits.calibration.parts import Part, Parts
from kvbits.codecs import Side
from kvbits.config import PAGE_TOKENS
from kvbits.models import LoadedModel

SIDES: tuple[Side, Side] = ("key", "value")
_GENERATOR = "generator"


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

    samples: Sequence[TensorSample]
    queries: tuple[Tensor, ...]
    scored: int


class _Samples(Sequence[TensorSample]):
    """The samples of windows that are finished, put together one at a time."""

    def __init__(self, windows: Sequence[Part], layers: int) -> None:
        self._windows = windows
        self._layers = layers

    def __len__(self) -> int:
        return len(SIDES) * self._layers

    @overload
    def __getitem__(self, index: int) -> TensorSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TensorSample]: ...
    def __getitem__(self, index: int | slice) -> TensorSample | list[TensorSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        layer, number = divmod(range(len(self))[index], len(SIDES))
        side = SIDES[number]
        rows, gradients = (
            torch.cat([window.tensor(f"{layer}.{side}.{what}") for window in self._windows])
            for what in ("rows", "gradients")
        )
        return TensorSample(layer, side, rows, gradients, len(self._windows))


def collect(
    loaded: LoadedModel,
    windows: Sequence[Sequence[int]],
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
    parts: Parts | None = None,
) -> Statistics:
    """Run every window (token ids, all of one length) forward and backward; the second half is scored.

    The model should compute in float32. Windows that are in ``parts`` are finished; others are kept there.
    ``progress`` is told the tokens done since its last call. Raises as
    :func:`kvbits.calibration.goal.check_context` and :class:`kvbits.calibration.layerwise.Layers`.
    """
    context = len(windows[0])
    check_context(context)
    layers = Layers(loaded)
    parts = Parts() if parts is None else parts
    generator = torch.Generator().manual_seed(seed)
    done = []
    for index, window in enumerate(windows):
        part = parts.get(f"window-{index}")
        if part is None:
            part = parts.put(f"window-{index}", _window(layers, window, generator, _tokens(context, progress)))
        else:
            progress(context)
        generator.set_state(part.tensor(_GENERATOR))
        done.append(part)
    count = loaded.geometry.num_layers
    queries = tuple(torch.stack([p.tensor(f"{i}.queries") for p in done]).sum(0) for i in range(count))
    return Statistics(_Samples(done, count), queries, len(windows) * (context - context // 2))


def _window(
    layers: Layers, window: Sequence[int], generator: torch.Generator, progress: Callable[[float], None]
) -> dict[str, Tensor]:
    """All that is kept of a window, and the state in which it leaves ``generator``."""
    found: dict[str, Tensor] = {}
    for index, seen, key, value in layers.gradients(window, generator, progress):
        named = {"key.rows": seen.key, "key.gradients": key, "value.rows": seen.value, "value.gradients": value}
        found |= {f"{index}.{name}": _pages(tensor) for name, tensor in named.items()}
        found[f"{index}.queries"] = seen.queries.cpu()
    return found | {_GENERATOR: generator.get_state()}


def _tokens(count: int, progress: Callable[[int], None]) -> Callable[[float], None]:
    """From the share of ``count`` tokens that is done to the tokens since the last call."""
    told = 0

    def tell(share: float) -> None:
        nonlocal told
        done = round(share * count)
        progress(done - told)
        told = done

    return tell


def _pages(rows: Tensor) -> Tensor:
    """``[tokens, kv_heads, dim]`` to full pages after the first, ``bfloat16 [pages, kv_heads, 64, dim]``."""
    full = len(rows) // PAGE_TOKENS
    pages: Tensor = rows[PAGE_TOKENS : full * PAGE_TOKENS].unflatten(0, (full - 1, PAGE_TOKENS))
    return pages.transpose(1, 2).to("cpu", torch.bfloat16).contiguous()
