"""Models in GGUF files, read by kvbits itself: one parse, nothing of the model's size held twice, nothing left out.

Names are imported when they are used: the header and the configuration's fields need neither torch nor transformers.
"""

from typing import TYPE_CHECKING

from kvbits.lazy import lazily

if TYPE_CHECKING:
    from kvbits.models.gguf.config import configuration
    from kvbits.models.gguf.dropped import refuse_dropped
    from kvbits.models.gguf.fields import family_of
    from kvbits.models.gguf.file import GgufFile
    from kvbits.models.gguf.tokenizer import read_tokenizer
    from kvbits.models.gguf.weights import Weights

__all__ = ["GgufFile", "Weights", "configuration", "family_of", "read_tokenizer", "refuse_dropped"]

__getattr__ = lazily(
    __name__,
    {
        "GgufFile": "kvbits.models.gguf.file",
        "Weights": "kvbits.models.gguf.weights",
        "configuration": "kvbits.models.gguf.config",
        "family_of": "kvbits.models.gguf.fields",
        "read_tokenizer": "kvbits.models.gguf.tokenizer",
        "refuse_dropped": "kvbits.models.gguf.dropped",
    },
)
