"""Formats of a model's weights: what their bytes mean, as plain torch; the products are in :mod:`kvbits.kernels`."""

from kvbits.weights.base import WeightFormat
from kvbits.weights.formats import FORMATS, ROUNDED

__all__ = ["FORMATS", "ROUNDED", "WeightFormat"]
