"""Numbers near float32's end, and attention that must stay finite."""

from __future__ import annotations

import torch

from helpers.attention import Inputs, run
from kvbits.config import LayerGeometry
from kvbits.kernels import Backend
from kvbits.kernels.reference import ReferenceBackend


def assert_huge_pages_are_read(backend: Backend, dtype: str) -> None:
    """Scores and sums stay finite where the reference's are, however low all scores of a row."""
    g = torch.Generator().manual_seed(0)
    layer = LayerGeometry(2, 1, 64, 64, 0.125)
    for size in (1e-5, 1.0, 1e10, 1e23, 1e30, 1e37):
        query, key, value = (torch.randn(66, n, 64, generator=g) for n in (2, 1, 1))
        inputs = Inputs([query / min(size, 1e6)], [key * size], [value * size], None)
        (got,), _ = run(backend, layer, dtype, inputs, 65)
        (wanted,), _ = run(ReferenceBackend(), layer, dtype, inputs, 65)
        assert (got - wanted).abs().max() <= 2e-5 * size, size
