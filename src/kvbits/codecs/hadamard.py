"""The Hadamard rotation of a head's channels, in the order of operations that the kernels keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_size(dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides ``dim``."""
    return dim & -dim


def rotate(rows: Tensor) -> Tensor:
    """Rotate the last dimension of ``float32 [..., dim]``, block by block; applied twice it is the identity.

    The rotation is orthogonal and symmetric: products of two rotated vectors are those of the vectors (QuaRot: Ashkboos
    et al., 2024, arXiv:2404.00456).
    """
    dim = rows.shape[-1]
    block = block_size(dim)
    x = rows
    step = 1
    while step < block:
        x = x.unflatten(-1, (dim // (2 * step), 2, step))
        first, second = x[..., 0, :], x[..., 1, :]
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        step *= 2
    return x * (1 / math.sqrt(block))
