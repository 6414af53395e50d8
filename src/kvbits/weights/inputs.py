"""The products' arithmetic in plain torch: what the native kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbits.weights.base import WeightFormat

HALF = 16
"""Inputs that share a scale: with 32, twice the loss (SmolLM2: KL 0.0028 and 0.0015), as few channels are large."""


def round_inputs(x: Tensor) -> Tensor:
    """``bfloat16 [rows, in]`` as the products with weights in bits see it, ``float64 [rows, in]``.

    Codes of 8 bits with a float32 scale for each 16: the largest magnitude over 127, to nearest even.
    """
    missing = -x.shape[1] % HALF
    groups = torch.nn.functional.pad(x.float(), (0, missing)).unflatten(1, (-1, HALF))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    codes = (groups * torch.where(scale > 0, 1 / scale, 0.0)).round()
    rounded: Tensor = (codes.double() * scale.double()).flatten(1)
    return rounded[:, : x.shape[1]]


def product(x: Tensor, weight: Tensor, weight_format: WeightFormat) -> Tensor:
    """``x`` ``bfloat16 [rows, in]`` times the weight that the bytes ``weight`` hold: ``float64 [rows, out]``, exact but
    for the rounding of the inputs."""
    wide = weight_format.decode(weight).double()[:, : x.shape[1]]
    return (round_inputs(x) if weight_format.rounds_inputs else x.double()) @ wide.T
