"""Models in GGUF files, read by kvbits itself: one parse, nothing of the model's size held twice, nothing left out."""

from kvbits.models.gguf.config import configuration, family_of
from kvbits.models.gguf.dropped import refuse_dropped
from kvbits.models.gguf.file import GgufFile
from kvbits.models.gguf.tokenizer import read_tokenizer
from kvbits.models.gguf.weights import Weights

__all__ = ["GgufFile", "Weights", "configuration", "family_of", "read_tokenizer", "refuse_dropped"]
