"""Models: found, loaded through transformers, measured, and run on a paged cache."""

from kvbits.models.geometry import geometry_of
from kvbits.models.load import LoadedModel, load_model

__all__ = ["LoadedModel", "geometry_of", "load_model"]
