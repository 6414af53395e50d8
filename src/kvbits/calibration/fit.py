"""Rounding parameters from statistics, and what every codec then costs in every place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kvbits.calibration.collect import Statistics, TensorSample
from kvbits.calibration.parts import Part, Parts
from kvbits.codecs import SCHEMES, Codec, Rounding

DAMPING = 0.01
"""Share of the metric's mean diagonal that is added to it: directions that the text never asked for stay cheap."""

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
CLIP_PAGES = 4
"""Every so many pages are used to fit a range: one number a head does not need them all."""


@dataclass(frozen=True)
class FittedCodec:
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
    parts: Parts | None = None,
) -> list[list[FittedCodec]]:
    """For every sample of ``statistics``, what each of the dtypes ``names`` that can store it costs, rounded at best.

    Keys are rounded with feedback under ``E[q q^T]`` where that costs less; the range is fitted head by head for few
    bits. The order is the samples'. ``progress`` is told after each sample. Samples that are in ``parts`` are finished;
    others are kept there.
    """
    table = []
    parts = Parts() if parts is None else parts
    for index in range(len(statistics.samples)):
        part = parts.get(f"fit-{index}")
        if part is None:
            row = _row(statistics, statistics.samples[index], names)
            facts = [(choice.name, choice.bytes, choice.cost) for choice in row]
            parts.put(f"fit-{index}", {f"{c.name}.{k}": v for c in row for k, v in _given(c.rounding)}, facts)
        else:
            row = _kept(part)
        table.append(row)
        progress(1)
    return table


def _row(statistics: Statistics, sample: TensorSample, names: Sequence[str]) -> list[FittedCodec]:
    fitting: dict[Codec, str] = {}  # dtypes may share a codec on one side: the first of them stands for all
    for name in names:
        codec = _codec(sample, name)
        if codec.supports(sample.rows.shape[-1]) is None:
            fitting.setdefault(replace(codec, name=""), name)
    metric = statistics.queries[sample.layer] if sample.side == "key" else None
    return [_choice(sample, name, metric, statistics.scored) for name in fitting.values()]


def _given(rounding: Rounding) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in vars(rounding).items() if tensor is not None]


def _kept(part: Part) -> list[FittedCodec]:
    held = part.names()

    def rounding(name: str) -> Rounding:
        return Rounding(
            **{f.name: part.tensor(f"{name}.{f.name}") for f in fields(Rounding) if f"{name}.{f.name}" in held}
        )

    return [FittedCodec(name, size, cost, rounding(name)) for name, size, cost in part.facts]


def _choice(sample: TensorSample, name: str, metric: Tensor | None, scored: int) -> FittedCodec:
    codec = _codec(sample, name)
    heads, dim = sample.rows.shape[1], sample.rows.shape[3]
    best = FittedCodec(name, heads * codec.page_bytes(dim), _total(sample, codec, Rounding(), scored), Rounding())
    fitted = Rounding()
    if metric is not None and codec.orders_channels:
        best = _better(best, sample, codec, Rounding(order=_dearest(sample, metric)), scored)
    elif metric is not None:
        # What a rotated codec rounds are the rotated channels, which rotated queries meet.
        fitted = ordered_feedback(codec.to_basis(codec.to_basis(metric).mT).mT)
        best = _better(best, sample, codec, fitted, scored)
    if codec.fits_range:
        clip = _clip(sample.thinned(CLIP_PAGES), codec, fitted)
        best = _better(best, sample, codec, replace(fitted, clip=clip), scored)
    return best


def _dearest(sample: TensorSample, metric: Tensor) -> Tensor:
    """Channels by what an error in proportion to their range costs, the dearest first: ``int32 [kv_heads, dim]``."""
    reach = (sample.rows.amax(2) - sample.rows.amin(2)).float().square().mean(0)
    weight = metric.diagonal(dim1=-2, dim2=-1) * reach
    return weight.argsort(dim=-1, descending=True, stable=True).int().contiguous()


def _clip(sample: TensorSample, codec: Codec, rounding: Rounding) -> Tensor:
    """The best of :data:`CLIPS` for each head, ``float32 [kv_heads]``."""
    costs = torch.stack(
        [_cost(sample, codec, replace(rounding, clip=torch.full((sample.rows.shape[1],), share))) for share in CLIPS]
    )
    return torch.tensor(CLIPS)[costs.argmin(0)]


def _better(best: FittedCodec, sample: TensorSample, codec: Codec, rounding: Rounding, scored: int) -> FittedCodec:
    found = _total(sample, codec, rounding, scored)
    return replace(best, cost=found, rounding=rounding) if found < best.cost else best


def _total(sample: TensorSample, codec: Codec, rounding: Rounding, scored: int) -> float:
    return float(_cost(sample, codec, rounding).sum()) / scored


def _cost(sample: TensorSample, codec: Codec, rounding: Rounding) -> Tensor:
    page = codec.encode(sample.rows.float(), sample.side, rounding)
    return sample.cost(codec.decode(page, sample.rows.shape[-1], sample.side))


def _codec(sample: TensorSample, name: str) -> Codec:
    return SCHEMES[name].key if sample.side == "key" else SCHEMES[name].value
