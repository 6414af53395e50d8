"""Calibrated roundings of made-up metrics, and the pages that they lead to."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from helpers.attention import Inputs
from helpers.driver import Frames
from kvbits.calibration.fit import ordered_feedback
from kvbits.codecs import SCHEMES, LayerRounding, Rounding
from kvbits.config import LayerGeometry, ModelGeometry
from kvbits.kernels import Backend, BatchLayout

DTYPES = [name for name in SCHEMES if name.startswith(("int", "nf")) and not name.endswith("b32")]
"""Those whose keys and values both take feedback."""


def skewed_metric(heads: int, dim: int, seed: int = 0) -> Tensor:
    """Second moments of vectors that lie near a few directions, as queries do."""
    g = torch.Generator().manual_seed(seed)
    few = torch.randn(heads, 6, dim, generator=g)
    vectors = torch.randn(heads, 500, 6, generator=g) @ few + 0.1 * torch.randn(heads, 500, dim, generator=g)
    return vectors.transpose(1, 2) @ vectors


def rounding_of(layer: LayerGeometry, clip: float | None) -> LayerRounding:
    clips = None if clip is None else torch.linspace(clip, 1.0, layer.num_kv_heads)
    key, value = (
        ordered_feedback(skewed_metric(layer.num_kv_heads, dim, seed))
        for dim, seed in ((layer.key_dim, 0), (layer.value_dim, 1))
    )
    if clip is None:  # and, for a change, channels as they come
        key, value = (Rounding(r.feedback) for r in (key, value))
    return LayerRounding(replace(key, clip=clips), replace(value, clip=clips))


def pages(backend: Backend, layer: LayerGeometry, dtype: str, inputs: Inputs, rounding: LayerRounding) -> Tensor:
    frames = Frames(ModelGeometry("test", (layer, layer), 8192, 16), dtype, 32)
    view = replace(frames.pool.layers[1], rounding=rounding)
    count = len(inputs.query[0])
    backend.forward(
        view, BatchLayout.of([frames.slice(0, count)]), inputs.query[0], inputs.key[0], inputs.value[0], None
    )
    size = view.sealed.scheme.layer_bytes(layer)
    return frames.page_bytes(0)[:, view.sealed.offset : view.sealed.offset + size]
