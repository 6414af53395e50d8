"""Random weights as the bytes of a format."""

from __future__ import annotations

import numpy as np
import torch

from kvbits.weights import WeightFormat

HALVES = {
    "int8": (0, 2),
    "uint4": (0, 2),
    "uint8": (0, 2),
    "q4_1": (0, 2),
    "q5_1": (0, 2),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}
"""Where a block has float16 numbers."""

ZEROS = {"uint4": 15, "uint8": 255}
"""The largest zero point of formats with one, a float16 at byte 2."""


def random_rows(weight_format: WeightFormat, out: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks with any codes and small scales of any sign."""
    rng = np.random.default_rng(seed)
    if weight_format.name == "bf16":
        numbers = torch.from_numpy(rng.standard_normal((out, 2 * blocks))).to(torch.bfloat16)
        return numbers.view(torch.uint8).numpy()
    rows = rng.integers(0, 256, (out, blocks, weight_format.block_bytes), dtype=np.uint8)
    for at in HALVES.get(weight_format.name, (0,)):
        scales = (rng.standard_normal((out, blocks, 1)) * 0.02).astype(np.float16)
        rows[:, :, at : at + 2] = scales.view(np.uint8)
    if weight_format.name in ZEROS:
        zeros = rng.integers(0, ZEROS[weight_format.name] + 1, (out, blocks, 1)).astype(np.float16)
        rows[:, :, 2:4] = zeros.view(np.uint8)
    return rows.reshape(out, -1)
