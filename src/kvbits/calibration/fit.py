"""Rounding parameters from statistics, and what every codec then costs in every place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbits.calibration.collect import Statistics, TensorSample
from kvbits.codecs import SCHEMES, Codec, Rounding

DAMPING = 0.01
"""Share of the metric's mean diagonal that is added to it: directions that the text never asked for stay cheap."""

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
CLIPPED_BITS = 3
"""Codecs of up to so many bits have their range fitted; finer ones lose more by saturation than they gain."""


@dataclass(frozen=True)
class Choice:
    """One codec for one layer's keys or values: page bytes of all heads, and KL per scored token (``cost``)."""

    name: str
    bytes: int
    cost: float
    rounding: Rounding


def ordered_feedback(metric: Tensor, damping: float = DAMPING) -> Rounding:
    """Feedback under ``metric``, heaviest channels first: most others are then still free to make up for them."""
    order = metric.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    rows = metric.gather(-2, order.unsqueeze(-1).expand_as(metric))
    permuted = rows.gather(-1, order.unsqueeze(-2).expand_as(metric))
    return Rounding(feedback_of(permuted, damping), order=order.int().contiguous())


def feedback_of(metric: Tensor, damping: float = DAMPING) -> Tensor:
    """The factors of :class:`kvbits.codecs.Rounding` under ``metric``, ``[heads, dim, dim]``; ``float32``.

    With ``inverse(metric) = U^T U`` and ``U`` upper triangular, channel ``c``'s error ``e`` is best made good by taking
    ``e * U[c, j] / U[c, c]`` from the channels ``j`` that are still free. All zero where the metric is.
    """
    metric = metric.double()
    dim = metric.shape[-1]
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(-1)
    # A head that nothing reads has no metric; any positive one keeps the algebra defined and gives no feedback.
    damped = metric + torch.eye(dim, dtype=torch.float64) * (damping * mean + (mean == 0)).view(-1, 1, 1)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    factors = upper / upper.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return torch.triu(factors, diagonal=1).float().contiguous()


def fit(
    statistics: Statistics,
    names: Sequence[str] = tuple(SCHEMES),
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Choice]]:
    """For every sample of ``statistics``, what each of the dtypes ``names`` that can store it costs, rounded at best.

    Keys are rounded with feedback under ``E[q q^T]``; the range is fitted head by head for few bits. The order is the
    samples'. ``progress`` is told after each sample.
    """
    table = []
    for sample in statistics.samples:
        fitted = ordered_feedback(statistics.queries[sample.layer]) if sample.side == "key" else Rounding()
        fitting = [name for name in names if _codec(sample, name).supports(sample.rows.shape[-1]) is None]
        table.append([_choice(sample, name, fitted, statistics.scored) for name in fitting])
        progress(1)
    return table


def _choice(sample: TensorSample, name: str, fitted: Rounding, scored: int) -> Choice:
    codec = _codec(sample, name)
    heads, dim = sample.rows.shape[1], sample.rows.shape[3]
    size = heads * codec.page_bytes(dim)
    bits = getattr(codec, "bits", 16)
    plain = Rounding()
    cost = _cost(sample, codec, plain)
    if bits > 8:
        return Choice(name, size, float(cost.sum()) / scored, plain)
    best_clip = torch.ones(heads)
    if bits <= CLIPPED_BITS or fitted.feedback is not None:
        best = torch.full((heads,), float("inf"), dtype=torch.float64)
        for clip in CLIPS if bits <= CLIPPED_BITS else CLIPS[:1]:
            found = _cost(sample, codec, replace(fitted, clip=torch.full((heads,), clip)))
            best_clip = torch.where(found < best, torch.tensor(clip), best_clip)
            best = torch.minimum(best, found)
        cost = best
    fitted = replace(fitted, clip=best_clip if bits <= CLIPPED_BITS else None)
    return Choice(name, size, float(cost.sum()) / scored, fitted)


def _codec(sample: TensorSample, name: str) -> Codec:
    return SCHEMES[name].key if sample.side == "key" else SCHEMES[name].value


def _cost(sample: TensorSample, codec: Codec, rounding: Rounding) -> Tensor:
    page = codec.encode(sample.rows, sample.side, rounding)
    return sample.cost(codec.decode(page, sample.rows.shape[-1], sample.side))
