"""Models: found, loaded (GGUF files by a reader of their own), measured, and run on a paged cache."""

from kvbits.models.ends import turn_ends
from kvbits.models.geometry import geometry_of
from kvbits.models.load import LoadedModel, load_model

__all__ = ["LoadedModel", "geometry_of", "load_model", "turn_ends"]
