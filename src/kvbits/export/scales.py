"""FP8 scales from what a model's keys and values really are on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kvbits.calibration.dense import run_dense
from kvbits.errors import ConfigError
from kvbits.models import LoadedModel

FP8_MAX = 448.0
"""The largest number of float8 e4m3 (OCP 8-bit floating point specification, table 1)."""

Granularity = Literal["tensor", "head"]


@dataclass(frozen=True)
class LayerScales:
    """Of one layer, ``float32 [1]`` or ``[kv_heads]``: an element is stored as ``x / scale``.

    ``key_error`` and ``value_error`` are the relative root-mean-square errors of the rows that were seen, stored with
    these scales; ``key_error_at_one`` and ``value_error_at_one`` with all scales 1, which engines use without
    calibration.
    """

    key: Tensor
    value: Tensor
    key_error: float
    value_error: float
    key_error_at_one: float
    value_error_at_one: float

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        found = {k: v for k, v in vars(self).items() if isinstance(v, float)}
        return {"k_scale": self.key.tolist(), "v_scale": self.value.tolist(), **found}


def collect_scales(
    loaded: LoadedModel,
    windows: Sequence[Sequence[int]],
    granularity: Granularity,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[LayerScales]:
    """Scales of every layer: the greatest magnitude in ``windows`` (token ids) over the largest FP8 number.

    Keys are taken after the position embedding, as the cache stores them. ``progress`` is told the tokens done. Raises
    ``ConfigError`` where a layer only ever saw zeros or a number that is not finite.
    """
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in loaded.geometry.layers]
    for window in windows:
        for parts, layer in zip(seen, run_dense(loaded, window), strict=True):
            parts.append((layer.key, layer.value))
        progress(len(window))
    return [_layer(index, parts, granularity) for index, parts in enumerate(seen)]


def fp8(rows: Tensor, scale: Tensor) -> Tensor:
    """``rows`` ``[tokens, kv_heads, dim]`` through float8 e4m3 and back; what is beyond its range saturates."""
    wide = scale.view(1, -1, 1)
    return (rows / wide).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * wide


def _layer(index: int, parts: Sequence[tuple[Tensor, Tensor]], granularity: Granularity) -> LayerScales:
    key, value = (torch.cat([part[side] for part in parts]) for side in (0, 1))
    scales = []
    for what, rows in (("keys", key), ("values", value)):
        most = rows.abs().amax((0, 2)) if granularity == "head" else rows.abs().amax().view(1)
        if not bool(torch.isfinite(most).all()) or not bool((most > 0).all()):
            raise ConfigError(f"the {what} of layer {index} reach {most.tolist()} on this text; no scale fits them")
        scales.append(most / FP8_MAX)
    one = torch.ones(1)
    return LayerScales(
        scales[0],
        scales[1],
        _error(key, scales[0]),
        _error(value, scales[1]),
        _error(key, one),
        _error(value, one),
    )


def _error(rows: Tensor, scale: Tensor) -> float:
    return float((fp8(rows, scale) - rows).norm() / rows.norm())
