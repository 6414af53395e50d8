"""Models: found, loaded (GGUF files by a reader of their own), measured, and run on a paged cache.

Names are imported when they are used: :mod:`kvbits.models.outline` needs neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from kvbits.lazy import lazily

if TYPE_CHECKING:
    from kvbits.models.ends import turn_ends
    from kvbits.models.geometry import geometry_of
    from kvbits.models.load import LoadedModel, load_model

__all__ = ["LoadedModel", "geometry_of", "load_model", "turn_ends"]

__getattr__ = lazily(
    __name__,
    {
        "LoadedModel": "kvbits.models.load",
        "geometry_of": "kvbits.models.geometry",
        "load_model": "kvbits.models.load",
        "turn_ends": "kvbits.models.ends",
    },
)
